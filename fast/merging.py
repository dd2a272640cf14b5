"""Merging on torch tensors: each cluster becomes one centroid, its members added in the reference's order."""

from dataclasses import dataclass

from jaxtyping import Float, Float32, Int64
from torch import Tensor

from . import operators
from .arguments import check_shape
from .backends import Backend, choose_backend

__all__ = ["Clustering", "merge"]


@dataclass(frozen=True, eq=False)
class Clustering:
    """Which entry each token belongs to: `labels` (..., tokens) and `counts` (..., entries), int64."""

    labels: Int64[Tensor, "*lead tokens"]
    counts: Int64[Tensor, "*lead entries"]


def merge(
    array: Float[Tensor, "*lead tokens dim"], clustering: Clustering, *, backend: Backend = "auto"
) -> Float32[Tensor, "*lead entries dim"]:
    """The mean of each cluster's tokens, (..., entries, dim) in float32.

    Defined, with its errors, by `kvcluster.reference.merge`; the same bits. `backend` as in `choose_backend`. Not
    differentiable. Works in as many steps as the largest cluster has members, without atomic additions.
    """
    check_shape("array", array)
    labels, counts = clustering.labels, clustering.counts
    if labels.shape != array.shape[:-1]:
        raise ValueError(
            f"labels must have the shape of array without dim, got {tuple(labels.shape)} and {tuple(array.shape)}"
        )
    if counts.shape[:-1] != labels.shape[:-1]:
        raise ValueError(
            f"counts must have the leading axes of labels, got {tuple(counts.shape)} and {tuple(labels.shape)}"
        )
    choose_backend(backend, array)
    return operators.merge(array, labels, counts, backend)
