"""Scaled dot-product attention: what the key-value cache is kept for."""

import numpy as np
from jaxtyping import Float, Float64

from .arguments import check_attention, check_scale

__all__ = ["attention", "softmax"]


def attention(
    query: Float[np.ndarray, "*lead queries dim"],
    keys: Float[np.ndarray, "*lead tokens dim"],
    values: Float[np.ndarray, "*lead tokens dim_value"],
    *,
    scale: float | None = None,
) -> Float64[np.ndarray, "*lead queries dim_value"]:
    """Values averaged with weights `softmax(scale * query . key)`.

    Parameters
    ----------
    query : (..., queries, dim), float16, bfloat16 or float32. With grouped-query attention the query
        heads that share a KV head are its `queries` (decoding: one query a head).
    keys : (..., tokens, dim), tokens >= 1.
    values : (..., tokens, dim_value).
    scale : factor of the logits; `1 / sqrt(dim)` by default.

    Returns
    -------
    (..., queries, dim_value), float64: computed in float64 from the inputs as they are, so that it can
    serve as the oracle of faster implementations.

    Raises
    ------
    ValueError : wrong dtype, NaN or infinity, no tokens, shapes that do not fit.

    Notes
    -----
    Costs `queries * tokens * (dim + dim_value)` multiply-adds per leading index and reads every key and
    value once: while decoding, the bytes of the cache set the time. Source: docs/papers.md, Ours: attention.

    Examples
    --------
    The query is orthogonal to the second key and nearly all weight falls on the first:

    >>> query = np.array([[10.0, 0.0]], dtype=np.float32)
    >>> keys = np.array([[1, 0], [0, 1]], dtype=np.float32)
    >>> values = np.array([[1, 2], [3, 4]], dtype=np.float32)
    >>> attention(query, keys, values).round(2)
    array([[1., 2.]])
    """
    check_attention(query, keys, values)
    logits = scaled_logits(query, keys, scale)  # (..., queries, tokens)
    return softmax(logits) @ values.astype(np.float64)  # (..., queries, dim_value)


def softmax(logits: Float64[np.ndarray, "*shape"]) -> Float64[np.ndarray, "*shape"]:
    """Exponentials over the last axis, divided by their sum; the maximum is subtracted first."""
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def scaled_logits(query: np.ndarray, keys: np.ndarray, scale: float | None) -> np.ndarray:
    """`scale * query . key` in float64, `(..., queries, tokens)`."""
    if scale is None:
        scale = 1 / np.sqrt(query.shape[-1])
    scale = check_scale(scale)
    return scale * np.einsum("...qd,...td->...qt", query.astype(np.float64), keys.astype(np.float64))
