"""The bound that attention outputs of every other implementation are held to.

Cluster assignments, counts and centroids must be identical, bit for bit. Attention outputs cannot be:
exponentials and sums are rounded differently everywhere. Three computations settle what is allowed:

* the *oracle*: `clustered_attention` of this package, float64 on the inputs as they are;
* the *baseline*: the plain formula with every result rounded to the dtype of the inputs, no trick at all, in a few
  orders of summation of which the worst counts (one order alone can be lucky). A head in which a number overflows that
  dtype has no error to be measured: there results are rounded to float32, and to float64 if that overflows too;
* the *subject*: the implementation under test.

The subject may be twice as wrong as the baseline, plus twice one rounding of the largest output. This is
the only tolerance of the project. Our choice, after the tests of flash-attention.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Float64, Int

from .clustered_attention import clustered_attention, log_counts

__all__ = ["AttentionAgreement", "attention_agreement"]

N_ORDERS = 8
# Spacing of each dtype at 1; NumPy's finfo does not know bfloat16.
EPS = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23}


@dataclass(frozen=True, eq=False)
class AttentionAgreement:
    """Largest absolute error of an output, and the largest allowed, per leading index (head): (...,), float64."""

    error: Float64[np.ndarray, "*lead"]
    bound: Float64[np.ndarray, "*lead"]

    @property
    def holds(self) -> bool:
        """Whether every head is within its bound."""
        return bool((self.error <= self.bound).all())


def attention_agreement(
    output: Float[np.ndarray, "*lead queries dim_value"],
    query: Float[np.ndarray, "*lead queries dim"],
    keys: Float[np.ndarray, "*lead entries dim"],
    values: Float[np.ndarray, "*lead entries dim_value"],
    counts: Int[np.ndarray, "*lead entries"] | None = None,
    *,
    scale: float | None = None,
) -> AttentionAgreement:
    """How far `output` is from the oracle, and how far it may be: `2 * (error(baseline) + eps * max|oracle|)`.

    Parameters
    ----------
    output : (..., queries, dim_value), what the implementation returned, in the dtype of `query`.
    query, keys, values, counts, scale : what it was given, as in `clustered_attention`; no counts means all 1.

    Raises
    ------
    ValueError : another shape or dtype than expected; NaN or infinity in `output`; else as `clustered_attention`.

    Examples
    --------
    >>> query, keys, values = (np.ones((1, 1), dtype=np.float32) for _ in range(3))
    >>> attention_agreement(np.array([[1.0]], dtype=np.float32), query, keys, values).holds
    True
    >>> attention_agreement(np.array([[1.1]], dtype=np.float32), query, keys, values).holds
    False
    """
    if counts is None:
        counts = np.ones(keys.shape[:-1], dtype=np.int64)
    oracle = clustered_attention(query, keys, values, counts, scale=scale)
    if output.shape != oracle.shape:
        raise ValueError(f"output must have shape {oracle.shape}, got {output.shape}")
    if output.dtype != query.dtype:
        raise ValueError(f"output must have the dtype of query, {query.dtype.name}, got {output.dtype.name}")
    if not np.isfinite(output).all():
        raise ValueError("output must be finite, got NaN or infinity")
    errors = [largest_difference(baseline, oracle) for baseline in baselines(query, keys, values, counts, scale)]
    return AttentionAgreement(
        error=largest_difference(output, oracle), bound=error_bound(errors, oracle, EPS[query.dtype.name])
    )


def error_bound(baseline_errors: list[np.ndarray], oracle: np.ndarray, eps: float) -> np.ndarray:
    """`2 * (worst baseline error + eps * max|oracle|)` per leading index, (...,)."""
    return 2 * (np.max(baseline_errors, axis=0) + eps * np.abs(oracle).max(axis=(-2, -1)))


def baselines(
    query: np.ndarray, keys: np.ndarray, values: np.ndarray, counts: np.ndarray, scale: float | None
) -> Iterator[np.ndarray]:
    """The plain formula with its sums in `N_ORDERS` orders: as given, then shuffled features and entries."""
    rng = np.random.default_rng(0)
    for order in range(N_ORDERS):
        features, entries = np.arange(keys.shape[-1]), np.arange(keys.shape[-2])
        if order > 0:
            features, entries = rng.permutation(features), rng.permutation(entries)
        arrays = (
            query[..., features],
            keys[..., entries, :][..., features],
            values[..., entries, :],
            counts[..., entries],
        )
        output = plain_attention(*arrays, scale)
        for dtype in (np.float32, np.float64):
            is_finite = np.isfinite(output).all(axis=(-2, -1), keepdims=True)
            if not is_finite.all():
                output = np.where(is_finite, output, plain_attention(*arrays, scale, dtype))
        yield output


@np.errstate(over="ignore", invalid="ignore")
def plain_attention(
    query: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    counts: np.ndarray,
    scale: float | None,
    dtype: type | None = None,
) -> np.ndarray:
    """The formula, term after term; sums in float32, as on GPUs, every result rounded to `dtype`, that of `query`.

    Rounded to float64, sums are float64 too.
    """
    if scale is None:
        scale = query.shape[-1] ** -0.5
    wide: Any = np.float64 if dtype is np.float64 else np.float32

    def rounded(array: np.ndarray) -> np.ndarray:
        return array.astype(query.dtype if dtype is None else dtype).astype(wide)

    wide_query, keys, values = (array.astype(wide) for array in (query, keys, values))
    bias = rounded(log_counts(counts))  # (..., entries)
    outputs = []
    for row in range(query.shape[-2]):
        logits = rounded(rounded(sum_in_order(wide_query[..., row, None, :] * keys)) * wide(scale))
        logits = rounded(logits + bias)  # (..., entries)
        exponentials = rounded(np.exp(rounded(logits - logits.max(axis=-1, keepdims=True))))
        weights = rounded(exponentials / rounded(sum_in_order(exponentials))[..., None])
        outputs.append(rounded(sum_in_order(weights[..., None, :] * np.swapaxes(values, -1, -2))))  # (..., dim_value)
    return np.stack(outputs, axis=-2)


def sum_in_order(terms: np.ndarray) -> np.ndarray:
    """Sum over the last axis in its dtype, one term after the other (NumPy's own sum adds pairs: it is more exact)."""
    return np.add.accumulate(terms, axis=-1, dtype=terms.dtype)[..., -1]


def largest_difference(output: np.ndarray, oracle: np.ndarray) -> np.ndarray:
    """Per leading index, (...,)."""
    return np.abs(output.astype(np.float64) - oracle).max(axis=(-2, -1))
