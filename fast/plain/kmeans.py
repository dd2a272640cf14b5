"""k-means over keys by cosine: labels by a filter with a proof, means in the order of the tokens."""

from collections.abc import Callable

from torch import Tensor

from ..exact.clusters import Fit
from ..exact.clusters import fit as fit_by
from ..exact.mean import cluster_means
from ..exact.similarity import normalized
from .assignment import assign

__all__ = ["fit"]


def fit(keys: Tensor, centroids: Tensor, *, max_iter: int, is_centred: bool) -> Fit:
    """k-means of keys (problems, tokens, dim), starting from centroids (problems, clusters, dim), float32."""
    return fit_by(keys, centroids, max_iter=max_iter, is_centred=is_centred, assign_to=assign_to, means=cluster_means)


def assign_to(keys: Tensor) -> Callable[[Tensor], tuple[Tensor, int]]:
    unit_keys, is_safe = normalized(keys)
    return lambda centroids: assign(keys, unit_keys, is_safe, centroids)
