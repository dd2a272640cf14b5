"""Recall: attend to the tokens of the clusters that lie nearest to the query (ClusterKV, arXiv:2412.03213)."""

import numpy as np
from jaxtyping import Float, Float64

from .arguments import check_attention, check_integer, check_labelled
from .clustered_attention import clustered_attention
from .kmeans import Clusters, update
from .selection import Selection, select_clusters

__all__ = ["recall_attention"]

LARGEST_BFLOAT16 = np.float32(2.0**127 * (2 - 2.0**-7))


def recall_attention(
    query: Float[np.ndarray, "*lead group dim"],
    keys: Float[np.ndarray, "*lead tokens dim"],
    values: Float[np.ndarray, "*lead tokens dim_value"],
    clusters: Clusters,
    *,
    budget: int,
    scale: float | None = None,
    centroids_for_rest: bool = False,
    spread: float = 0.5,
) -> Float64[np.ndarray, "*lead group dim_value"]:
    """Attention of a group of query heads to the tokens that `select_clusters` takes for them.

    Parameters
    ----------
    query : (..., group, dim), float16, bfloat16 or float32: the query heads that share one KV head.
    keys, values : (..., tokens, dim) and (..., tokens, dim_value): all tokens, in the order of `clusters.labels`.
    clusters : of the keys, as `kmeans` gives them.
    budget : tokens attended to, at least 1.
    scale : factor of the logits; `1 / sqrt(dim)` by default.
    centroids_for_rest : let each cluster's centroids, of keys and of values, stand for its tokens that were not taken,
        with the logarithm of their number added to the logit. They come on top of the budget.
    spread : as in `select_clusters`, with the clusters' `mean_deviations`.

    Returns
    -------
    (..., group, dim_value), float64. Full attention where budget >= tokens.

    Raises
    ------
    ValueError : as `attention` and `select_clusters`; clusters of other keys.

    Notes
    -----
    Reads `n_clusters` centroids and `budget` keys and values instead of all. That the tokens left out of a
    trimmed cluster have the centroid of the whole cluster is our choice. Exact tokens for the clusters that matter and
    centroids for the rest are the idea of Multipole Attention (arXiv:2506.13059). What a budget guarantees:
    theory/recall, R1 to R4. Source: docs/papers.md, Ours: stand-ins.

    Examples
    --------
    Two clusters of two equal keys; the query's own is recalled. With a centroid for the other, nothing is missing:

    >>> from kvcluster.reference import attention, kmeans
    >>> keys = np.array([[2, 0], [0, 2], [2, 0], [0, 2]], dtype=np.float32)
    >>> values = np.array([[1], [2], [3], [4]], dtype=np.float32)
    >>> query = np.array([[1, 0]], dtype=np.float32)
    >>> clusters = kmeans(keys, n_clusters=2, init=np.array([0, 1]))
    >>> recall_attention(query, keys, values, clusters, budget=2)
    array([[2.]])
    >>> output = recall_attention(query, keys, values, clusters, budget=2, centroids_for_rest=True)
    >>> bool(abs(output - attention(query, keys, values)) < 1e-12)
    True
    """
    check_attention(query, keys, values)
    budget = check_integer("budget", budget, least=1)
    check_labelled(keys, clusters.labels)
    selection = select_clusters(
        query,
        clusters.centroids,
        clusters.counts,
        budget=budget,
        deviations=mean_deviations(keys, clusters),
        spread=spread,
    )
    value_centroids = mean_of_members(values, clusters) if centroids_for_rest else None
    entries = recalled_entries(keys, values, clusters, selection, value_centroids)
    return clustered_attention(query, *entries, scale=scale)


def recalled_entries(
    keys: np.ndarray, values: np.ndarray, clusters: Clusters, selection: Selection, value_centroids: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What a query attends to: keys, values and counts (..., entries, .) of the recalled tokens, then of the centroids.

    A centroid stands for the tokens of its cluster that were not taken, and counts them; without `value_centroids`
    there are no centroids. The -1 that fill up shorter lists get count 0.
    """
    tokens = selection.tokens(clusters)  # (..., recalled)
    keys, values = (np.take_along_axis(array, tokens[..., None], axis=-2) for array in (keys, values))
    counts = (tokens >= 0).astype(np.int64)
    if value_centroids is None:
        return keys, values, counts
    keys = np.concatenate([keys.astype(np.float32), clusters.centroids], axis=-2)
    values = np.concatenate([values.astype(np.float32), value_centroids], axis=-2)
    return keys, values, np.concatenate([counts, clusters.counts - selection.taken], axis=-1)


def mean_of_members(values: np.ndarray, clusters: Clusters) -> np.ndarray:
    """Value centroids (..., clusters, dim_value), float32, by the rules for keys; 0 for an empty cluster."""
    means = np.zeros((*clusters.counts.shape, values.shape[-1]), dtype=np.float32)
    for problem in np.ndindex(*values.shape[:-2]):
        means[problem] = update(values[problem], clusters.labels[problem], means[problem])
    return means


def mean_deviations(keys: np.ndarray, clusters: Clusters) -> np.ndarray:
    """How far each cluster's keys lie from its centroid: mean of |key - centroid| feature by feature.

    (..., clusters, dim), float32, by the same rules as a centroid; 0 for an empty cluster.
    """
    deviations = np.zeros_like(clusters.centroids)
    for problem in np.ndindex(*keys.shape[:-2]):
        labels = clusters.labels[problem]
        differences = keys[problem].astype(np.float64) - clusters.centroids[problem].astype(np.float64)[labels]
        deviations[problem] = update(np.abs(differences), labels, deviations[problem])
    return deviations


def round_to_bfloat16(array: np.ndarray) -> np.ndarray:
    """float32 numbers rounded to bfloat16, ties to even, at most to its largest finite number; still of dtype float32.

    >>> round_to_bfloat16(np.array([1.0, 1.00390625, 1.01171875, 3.4e38], dtype=np.float32))
    array([1.0000000e+00, 1.0000000e+00, 1.0156250e+00, 3.3895314e+38],
          dtype=float32)
    """
    bits = np.clip(array, -LARGEST_BFLOAT16, LARGEST_BFLOAT16).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)
