"""k-means over keys by cosine, by kernels."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..exact.chunks import count_members
from ..exact.clusters import Fit
from ..exact.clusters import fit as fit_by
from .assign import assign
from .merge import merge

__all__ = ["cluster_means", "fit"]


def fit(keys: Tensor, centroids: Tensor, *, max_iter: int, is_centred: bool) -> Fit:
    """As `kvcluster.fast.plain.kmeans.fit`."""
    return fit_by(keys, centroids, max_iter=max_iter, is_centred=is_centred, assign_to=assign_to, means=cluster_means)


def assign_to(keys: Tensor) -> Callable[[Tensor], tuple[Tensor, int]]:
    def labels_of(centroids: Tensor) -> tuple[Tensor, int]:
        labels, is_scored = assign(keys, centroids)
        return labels, int(is_scored.sum())

    return labels_of


def cluster_means(keys: Tensor, labels: Tensor, kept: Tensor, away_from: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As `kvcluster.fast.exact.mean.cluster_means`."""
    if away_from is not None:
        centres = away_from.double().gather(1, labels.unsqueeze(-1).expand(-1, -1, keys.shape[-1]))
        keys = (keys.double() - centres).abs()
    counts = count_members(labels, kept.shape[1])
    means = merge(keys.unsqueeze(0), labels, counts)
    return counts, torch.where(counts.unsqueeze(-1) > 0, means, kept)
