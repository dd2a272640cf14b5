"""Merging on torch tensors: each cluster becomes one centroid, its members added in the reference's order."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from .arguments import check_array

__all__ = ["Clustering", "merge"]


@dataclass(frozen=True, eq=False)
class Clustering:
    """Which entry each token belongs to: `labels` (..., tokens) and `counts` (..., entries), int64."""

    labels: Int64[Tensor, "*lead tokens"]
    counts: Int64[Tensor, "*lead entries"]


def merge(array: Float[Tensor, "*lead tokens dim"], clustering: Clustering) -> Float32[Tensor, "*lead entries dim"]:
    """The mean of each cluster's tokens, (..., entries, dim) in float32.

    Defined, with its errors, by `kvcluster.reference.merge`; the same bits. Works in as many steps as the largest
    cluster has members, each over all clusters of all problems at once, without atomic additions.
    """
    check_array("array", array)
    labels, counts = clustering.labels, clustering.counts
    if labels.shape != array.shape[:-1]:
        raise ValueError(
            f"labels must have the shape of array without dim, got {tuple(labels.shape)} and {tuple(array.shape)}"
        )
    if counts.shape[:-1] != labels.shape[:-1]:
        raise ValueError(
            f"counts must have the leading axes of labels, got {tuple(counts.shape)} and {tuple(labels.shape)}"
        )
    if bool((counts < 1).any()):
        raise ValueError(f"counts must be at least 1, got {int(counts.min())}")
    return ordered_mean(array, labels, counts)


def ordered_mean(array: Tensor, labels: Tensor, counts: Tensor) -> Tensor:
    """`merge` without the checks."""
    entries, dim = counts.shape[-1], array.shape[-1]
    tokens = array.reshape(-1, dim)  # (problems * tokens, dim)
    offsets = torch.arange(counts.shape[:-1].numel(), device=labels.device) * entries  # first entry of each problem
    labels = (labels.reshape(len(offsets), -1) + offsets[:, None]).reshape(-1)
    counts = counts.reshape(-1)  # (problems * entries,)
    members = labels.argsort(stable=True)  # tokens, cluster after cluster, ascending inside each
    first = counts.cumsum(0) - counts  # where each cluster begins in `members`
    sums = tokens[members[first]].double()
    for rank in range(1, int(counts.max()) if len(counts) else 0):
        larger = (counts > rank).nonzero().squeeze(-1)  # clusters that have a member of this rank
        sums[larger] += tokens[members[first[larger] + rank]].double()
    means = (sums / counts.unsqueeze(-1)).float()
    return means.reshape(*array.shape[:-2], entries, dim)
