"""Clusters of keys, and the rounds of k-means, whichever backend assigns tokens and makes means."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

__all__ = ["Clusters", "Fit", "fit"]

AssignTo = Callable[[Tensor], Callable[[Tensor], tuple[Tensor, int]]]
Means = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True, eq=False)
class Clusters:
    """Which cluster each token belongs to, and where the clusters lie: as in `kvcluster.reference.kmeans`."""

    labels: Int64[Tensor, "*lead tokens"]
    counts: Int64[Tensor, "*lead clusters"]
    centroids: Float32[Tensor, "*lead clusters dim"]

    @cached_property
    def members(self) -> Int64[Tensor, "*lead tokens"]:
        """Token indices, cluster after cluster, ascending inside each."""
        return self.labels.argsort(dim=-1, stable=True)

    @cached_property
    def first_member(self) -> Int64[Tensor, "*lead clusters"]:
        """Where each cluster begins in `members`: sums of the counts before it."""
        return self.counts.cumsum(dim=-1) - self.counts


@dataclass(frozen=True, eq=False)
class Fit:
    """Clusters (problems, ...) and how much of the work the filter could not settle.

    `n_rows` tokens were assigned, in all rounds; `n_scored_rows` of these needed canonical scores.
    """

    labels: Int64[Tensor, "problems tokens"]
    counts: Int64[Tensor, "problems clusters"]
    centroids: Float32[Tensor, "problems clusters dim"]
    n_rows: int
    n_scored_rows: int


def fit(
    keys: Float[Tensor, "problems tokens dim"],
    centroids: Float32[Tensor, "problems clusters dim"],
    *,
    max_iter: int,
    is_centred: bool,
    assign_to: AssignTo,
    means: Means,
) -> Fit:
    """k-means of keys, starting from the given centroids.

    Parameters
    ----------
    assign_to : given keys, returns a function that, given centroids, returns the keys' labels and how many of them
        needed canonical scores.
    means : given keys, labels and centroids, returns counts and means; an empty cluster keeps its centroid.
    """
    if not is_centred:
        return lloyd(keys, centroids, max_iter, assign_to, means)
    one_cluster = torch.zeros(keys.shape[:2], dtype=torch.int64, device=keys.device)
    mean = means(keys, one_cluster, centroids[:, :1])[1]  # (problems, 1, dim)
    centred = lloyd(shift(keys, -mean), shift(centroids, -mean), max_iter, assign_to, means)
    counts, centroids = means(keys, centred.labels, shift(centred.centroids, mean))
    return Fit(centred.labels, counts, centroids, centred.n_rows, centred.n_scored_rows)


def lloyd(keys: Tensor, centroids: Tensor, max_iter: int, assign_to: AssignTo, means: Means) -> Fit:
    """The rounds. A problem whose labels repeat stays unchanged until those of all repeat."""
    labels_of = assign_to(keys)
    labels = torch.full(keys.shape[:2], -1, device=keys.device)
    counts = labels.new_zeros(centroids.shape[:2])
    n_rows = n_scored_rows = 0
    for _ in range(max_iter):
        before = labels
        labels, n_scored = labels_of(centroids)
        n_rows, n_scored_rows = n_rows + labels.numel(), n_scored_rows + n_scored
        if torch.equal(labels, before):
            break
        counts, centroids = means(keys, labels, centroids)
    return Fit(labels, counts, centroids, n_rows, n_scored_rows)


def shift(keys: Tensor, by: Tensor) -> Tensor:
    """`keys + by`, added in float64 and rounded to float32."""
    shifted = (keys.double() + by.double()).float()
    if not bool(torch.isfinite(shifted).all()):
        raise ValueError(
            f"keys must stay finite in float32 less their mean, got sizes up to {float(keys.abs().max()):.3g}"
        )
    return shifted
