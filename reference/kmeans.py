"""k-means over keys by cosine: the clusters from which ClusterKV (arXiv:2412.03213) recalls tokens."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float32, Int, Int64

from .arguments import check_array, check_init, check_integer, check_n_clusters
from .similarity import similarity

__all__ = ["Clusters", "kmeans"]

ROWS_TOGETHER = 128  # tokens whose similarities are held at once


@dataclass(frozen=True, eq=False)
class Clusters:
    """Which cluster each token belongs to, and where the clusters lie (docs/papers.md, ClusterKV: what is clustered).

    Attributes
    ----------
    labels : (..., tokens), int64: cluster of each token, from 0 to clusters - 1.
    counts : (..., clusters), int64: tokens of each cluster, 0 where it is empty; they sum to `tokens`.
    centroids : (..., clusters, dim), float32: means of the clusters' keys.
    """

    labels: Int64[np.ndarray, "*lead tokens"]
    counts: Int64[np.ndarray, "*lead clusters"]
    centroids: Float32[np.ndarray, "*lead clusters dim"]

    @property
    def members(self) -> Int64[np.ndarray, "*lead tokens"]:
        """Token indices, cluster after cluster, ascending inside each."""
        return np.argsort(self.labels, axis=-1, kind="stable")

    @property
    def first_member(self) -> Int64[np.ndarray, "*lead clusters"]:
        """Where each cluster begins in `members`: sums of the counts before it."""
        return self.counts.cumsum(axis=-1) - self.counts


def kmeans(
    keys: Float[np.ndarray, "*lead tokens dim"],
    *,
    n_clusters: int,
    init: Int[np.ndarray, "*lead n_clusters"] | Float[np.ndarray, "*lead n_clusters dim"] | None = None,
    max_iter: int = 10,
    is_centred: bool = False,
) -> Clusters:
    """Clusters of keys that point in similar directions.

    Parameters
    ----------
    keys : (..., tokens, dim), float16, bfloat16 or float32.
    n_clusters : from 1 to tokens.
    init : the first centroids: token indices (..., n_clusters), or centroids (..., n_clusters, dim); by default
        the tokens `i * tokens // n_clusters`, evenly spaced.
    max_iter : rounds of assigning and updating, at least 1.
    is_centred : assign by the keys minus their mean (rounded to float32), which removes what all keys share. The
        returned centroids are means of the keys as they are.

    Returns
    -------
    Clusters : every centroid is the mean of its cluster; an empty cluster keeps its last centroid.

    Raises
    ------
    ValueError : n_clusters or max_iter out of range; an init that does not fit; keys of a wrong dtype or shape, NaN or
        infinite; keys so large that they overflow float32 when their mean is subtracted.

    Notes
    -----
    A round assigns each token to the centroid of highest canonical `similarity`, of ties the first, then makes each
    centroid the mean of its tokens: added in float64 in ascending token order, divided by the count, rounded once to
    float32. Rounds end early when the labels repeat. One round costs about `2 * tokens * n_clusters * dim` operations
    (exactly: theory/complexity, C2).

    From the paper: distance 1 - cosine, plain means, rounds until the labels repeat. Our choices: `init` (the paper
    takes a random sample), `max_iter`, what becomes of empty clusters, squared cosine in float64, `is_centred`.

    References
    ----------
    ClusterKV, arXiv:2412.03213 (DAC 2025). Source: docs/papers.md, ClusterKV: distance.

    Examples
    --------
    Three keys in two directions; token 1 lies between the others but nearer to token 2, whatever their lengths:

    >>> keys = np.array([[1, 0], [2, 4], [0, 1]], dtype=np.float32)
    >>> clusters = kmeans(keys, n_clusters=2, init=np.array([0, 2]))
    >>> clusters.labels, clusters.counts
    (array([0, 1, 1]), array([1, 2]))
    >>> clusters.centroids
    array([[1. , 0. ],
           [1. , 2.5]], dtype=float32)
    """
    check_array("keys", keys)
    *lead, tokens, dim = keys.shape
    n_clusters = check_n_clusters(n_clusters, tokens)
    max_iter = check_integer("max_iter", max_iter, least=1)
    if init is None:
        init = np.broadcast_to(np.arange(n_clusters) * tokens // n_clusters, (*lead, n_clusters))
    check_init(keys, init, n_clusters)

    labels = np.empty((*lead, tokens), dtype=np.int64)
    counts = np.empty((*lead, n_clusters), dtype=np.int64)
    centroids = np.empty((*lead, n_clusters, dim), dtype=np.float32)
    for problem in np.ndindex(*lead):
        first = keys[problem][init[problem]] if init.dtype.kind in "iu" else init[problem]
        labels[problem], centroids[problem] = lloyd(keys[problem], first.astype(np.float32), max_iter, is_centred)
        counts[problem] = np.bincount(labels[problem], minlength=n_clusters)
    return Clusters(labels, counts, centroids)


def lloyd(keys: np.ndarray, centroids: np.ndarray, max_iter: int, is_centred: bool) -> tuple[np.ndarray, np.ndarray]:
    """Labels (tokens,) and centroids (clusters, dim) of keys (tokens, dim), starting from the given centroids."""
    if is_centred:
        mean = update(keys, np.zeros(len(keys), dtype=np.int64), centroids[:1])  # (1, dim)
        labels, shifted = lloyd(shift(keys, -mean), shift(centroids, -mean), max_iter, is_centred=False)
        return labels, update(keys, labels, shift(shifted, mean))
    labels = np.full(len(keys), -1)
    for _ in range(max_iter):
        before, labels = labels, assign(keys, centroids)
        if np.array_equal(labels, before):
            break
        centroids = update(keys, labels, centroids)
    return labels, centroids


def assign(keys: Float[np.ndarray, "tokens dim"], centroids: Float32[np.ndarray, "clusters dim"]) -> np.ndarray:
    """Most similar centroid of each token, (tokens,)."""
    parts = [keys[first : first + ROWS_TOGETHER] for first in range(0, len(keys), ROWS_TOGETHER)]
    return np.concatenate([similarity(part, centroids).argmax(axis=-1) for part in parts])  # argmax: of ties, the first


def update(keys: np.ndarray, labels: np.ndarray, centroids: np.ndarray) -> Float32[np.ndarray, "clusters dim"]:
    """Mean of each cluster's rows of `keys` (tokens, dim); for an empty cluster, its row of `centroids`."""
    sums = np.full((len(centroids), keys.shape[-1]), -0.0)  # -0.0, not 0.0: only -0.0 + x is x for every x
    for token, label in enumerate(labels):
        sums[label] += keys[token].astype(np.float64)
    counts = np.bincount(labels, minlength=len(centroids))[:, None]
    return np.where(counts == 0, centroids, (sums / np.maximum(counts, 1)).astype(np.float32))


def shift(keys: np.ndarray, by: np.ndarray) -> np.ndarray:
    """`keys + by`, added in float64 and rounded to float32, so that every machine gets the same."""
    with np.errstate(over="ignore"):
        shifted = (keys.astype(np.float64) + by.astype(np.float64)).astype(np.float32)
    if not np.isfinite(shifted).all():
        raise ValueError(f"keys must stay finite in float32 less their mean, got sizes up to {np.abs(keys).max():.3g}")
    return shifted
