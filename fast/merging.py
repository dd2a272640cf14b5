"""Merging on torch tensors: each cluster becomes one centroid, its members added in the reference's order."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from .arguments import check_clustering, check_finite, check_integers, check_shape
from .backends import AnyBackend, choose, implementation

__all__ = ["Clustering", "merge"]


@dataclass(frozen=True, eq=False)
class Clustering:
    """Which entry each token belongs to: `labels` (..., tokens) and `counts` (..., entries), int64."""

    labels: Int64[Tensor, "*lead tokens"]
    counts: Int64[Tensor, "*lead entries"]


def merge(
    array: Float[Tensor, "*lead tokens dim"], clustering: Clustering, *, backend: AnyBackend = "auto"
) -> Float32[Tensor, "*lead entries dim"]:
    """The mean of each cluster's tokens, (..., entries, dim) in float32.

    Defined, with its errors, by `kvcluster.reference.merge`; the same bits. `backend` as in `choose`. Not
    differentiable. Without atomic additions; in torch in as many steps as the largest cluster has members.
    """
    check_shape("array", array)
    labels = check_integers("labels", clustering.labels, array)
    counts = check_integers("counts", clustering.counts, array)
    if labels.shape != array.shape[:-1]:
        raise ValueError(
            f"labels must have the shape of array without dim, got {tuple(labels.shape)} and {tuple(array.shape)}"
        )
    if counts.shape[:-1] != labels.shape[:-1]:
        raise ValueError(
            f"counts must have the leading axes of labels, got {tuple(counts.shape)} and {tuple(labels.shape)}"
        )
    if not torch.compiler.is_compiling():  # the operator chooses again, and is not traced
        choose("merge", backend, array)
    return merge_clusters(array, labels, counts, backend)


@torch.library.custom_op("kvcluster::merge", mutates_args=())
def merge_clusters(array: Tensor, labels: Tensor, counts: Tensor, backend: str) -> Tensor:
    """Centroids (..., entries, dim), float32: an operator that `torch.compile` goes around."""
    check_finite("array", array)
    check_clustering(labels, counts)
    means: Tensor = implementation("merge", backend, array)(array, labels, counts)
    return means


@merge_clusters.register_fake
def _(array: Tensor, labels: Tensor, counts: Tensor, backend: str) -> Tensor:
    """Its shape, which follows from the arguments' shapes alone."""
    return array.new_empty((*counts.shape, array.shape[-1]), dtype=torch.float32)
