"""Attention to a clustered cache: a centroid that stands for n tokens gets n times the weight of one."""

import numpy as np
from jaxtyping import Float, Float64, Int

from .arguments import check_attention, check_counts
from .attention import scaled_logits, softmax

__all__ = ["clustered_attention", "log_counts"]


def clustered_attention(
    query: Float[np.ndarray, "*lead queries dim"],
    keys: Float[np.ndarray, "*lead entries dim"],
    values: Float[np.ndarray, "*lead entries dim_value"],
    counts: Int[np.ndarray, "*lead entries"],
    *,
    scale: float | None = None,
) -> Float64[np.ndarray, "*lead queries dim_value"]:
    """Values averaged with weights `softmax(scale * query . key + log(count))` (proportional attention).

    Parameters
    ----------
    query : (..., queries, dim), float16, bfloat16 or float32: the query heads of one KV head, or several positions.
    keys, values : (..., entries, dim) and (..., entries, dim_value): tokens and centroids, entries >= 1.
    counts : (..., entries), any integer dtype: tokens per entry. An entry of count 0 is left out.
    scale : factor of the logits; `1 / sqrt(dim)` by default.

    Returns
    -------
    (..., queries, dim_value), float64.

    Raises
    ------
    ValueError : as `attention`; a negative count; a leading index with counts of 0 only; counts of another shape or
        dtype.

    Notes
    -----
    Exact when all keys of a cluster are equal, whatever their values: n equal logits sum to the one logit plus
    log n, and their values are averaged. Otherwise `q . centroid + log n <= logsumexp(q . k_i)` (Jensen): a
    cluster gets at most the weight of its tokens. Proofs, and how much is lost: theory/merging, M1 to M5. Log
    counts: reported for CentroidKV (arXiv:2506.11418, "degree correction") and used before in ToMe (arXiv:2210.09461).
    Costs `entries` instead of `tokens`. Source: docs/papers.md, Chelsea: attention.

    Examples
    --------
    Two equal keys merged with count 2 leave the output unchanged; forgetting the count does not:

    >>> from kvcluster.reference import attention
    >>> query = np.array([[1.0]], dtype=np.float32)
    >>> keys, values = (np.array(a, dtype=np.float32)[:, None] for a in ([0, 0, 0], [3, 5, 1]))
    >>> attention(query, keys, values)
    array([[3.]])
    >>> merged_keys, merged_values = (np.array(a, dtype=np.float32)[:, None] for a in ([0, 0], [4, 1]))
    >>> clustered_attention(query, merged_keys, merged_values, np.array([2, 1])).round(12)
    array([[3.]])
    >>> clustered_attention(query, merged_keys, merged_values, np.array([1, 1]))
    array([[2.5]])
    """
    check_attention(query, keys, values)
    check_counts(keys, counts)
    logits = scaled_logits(query, keys, scale) + log_counts(counts)[..., None, :]  # (..., queries, entries)
    return softmax(logits) @ values.astype(np.float64)  # (..., queries, dim_value)


def log_counts(counts: Int[np.ndarray, "*shape"]) -> Float64[np.ndarray, "*shape"]:
    """Natural logarithm of the counts, minus infinity where a count is 0."""
    with np.errstate(divide="ignore"):
        return np.log(counts.astype(np.float64))
