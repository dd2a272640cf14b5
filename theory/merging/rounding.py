"""How wrong the reference's attention can be through rounding: notation.md, lemma N1."""

import numpy as np

from kvcluster.reference.clustered_attention import log_counts

__all__ = ["attention_rounding", "lengths"]


def attention_rounding(
    query: np.ndarray, keys: np.ndarray, values: np.ndarray, counts: np.ndarray | None = None, *, scale: float
) -> np.ndarray:
    """Largest Euclidean length of the error of `clustered_attention`'s output for each query, (..., queries).

    Parameters
    ----------
    query, keys, values, counts, scale : as in `clustered_attention`; no counts means all 1.
    """
    logits = abs(scale) * lengths(query) * lengths(keys).max(axis=-1, keepdims=True)  # (..., queries)
    logarithms = 0.0 if counts is None else np.maximum(log_counts(counts), 0).max(axis=-1, keepdims=True)
    dim, entries = keys.shape[-1], keys.shape[-2]
    roundings = (dim + 6) * logits + 13 * logarithms + entries + 10
    return 1.1 * 2.0**-52 * roundings * lengths(values).max(axis=-1, keepdims=True)


def lengths(rows: np.ndarray) -> np.ndarray:
    """Euclidean length of each row, (..., tokens), in float64."""
    return np.linalg.norm(rows.astype(np.float64), axis=-1)
