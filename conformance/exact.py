"""Attention outputs and their bounds to the last bit, for files that must not depend on the machine.

`exp`, and the order in which a library adds, differ between processors. With NumPy's vector instructions on and off,
outputs differ by up to 2**-41 of themselves (2**-50 of the largest), and bounds of float32 by up to 64%, because there
one bit of an exponential is as large as the error that is measured. Rounding cannot hide that: some value always lies
next to a boundary. So the contract for decisions is applied to attention here too: only `+ - * /` in float64, in an
order that is written down.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from jaxtyping import Float, Float64, Int

from kvcluster.reference import agreement
from kvcluster.reference.similarity import halving_sum

__all__ = ["exact_attention", "exact_bound"]

# ln 2 in two parts: the first has 33 bits, so that its product with an exponent is exact.
LN2 = (float.fromhex("0x1.62e42feep-1"), float.fromhex("0x1.a39ef35793c76p-33"))


def exact_attention(
    query: Float[np.ndarray, "*lead queries dim"],
    keys: Float[np.ndarray, "*lead entries dim"],
    values: Float[np.ndarray, "*lead entries dim_value"],
    counts: Int[np.ndarray, "*lead entries"] | None,
    scale: float | None,
) -> Float64[np.ndarray, "*lead queries dim_value"]:
    """`clustered_attention`, with weights `count * exp(logit)` instead of `exp(logit + log(count))`."""
    query, keys, values = (array.astype(np.float64) for array in (query, keys, values))
    scale = 1 / np.sqrt(query.shape[-1]) if scale is None else scale
    entry_weights = np.ones(keys.shape[:-1]) if counts is None else counts.astype(np.float64)
    entry_weights = entry_weights[..., None, :]  # (..., 1, entries)
    logits = scale * halving_sum(query[..., :, None, :] * keys[..., None, :, :])  # (..., queries, entries)
    logits = np.where(entry_weights > 0, logits, -np.inf)
    weights = entry_weights * exponential(logits - logits.max(axis=-1, keepdims=True))
    sums = halving_sum(weights[..., None, :] * values.swapaxes(-1, -2)[..., None, :, :])  # (..., queries, dim_value)
    return sums / halving_sum(weights)[..., None]


def exact_bound(
    oracle: Float64[np.ndarray, "*lead queries dim_value"],
    query: Float[np.ndarray, "*lead queries dim"],
    keys: Float[np.ndarray, "*lead entries dim"],
    values: Float[np.ndarray, "*lead entries dim_value"],
    counts: Int[np.ndarray, "*lead entries"] | None,
    scale: float | None,
) -> Float64[np.ndarray, "*lead"]:
    """The bound of `attention_agreement`, from the same baselines with `exponential` as their exponential."""
    counts = np.ones(keys.shape[:-1], np.int64) if counts is None else counts
    with same_exponential_everywhere():
        baselines = list(agreement.baselines(query, keys, values, counts, scale))
    errors = [agreement.largest_difference(baseline, oracle) for baseline in baselines]
    return agreement.error_bound(errors, oracle, agreement.EPS[query.dtype.name])


def exponential(x: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """exp(x) of numbers x <= 0, in their dtype; 0 below -690.

    >>> exponential(np.array([0.0, -1.0, -700.0]))
    array([1.        , 0.36787944, 0.        ])
    """
    y = np.maximum(x.astype(np.float64), -700.0)
    exponent = np.rint(y / LN2[0])
    remainder = (y - exponent * LN2[0]) - exponent * LN2[1]
    series = np.ones_like(y)
    for i in range(18, 0, -1):  # Taylor, |rest| < 0.35: the terms left out are below 2**-80
        series = 1.0 + series * remainder / i
    return np.where(y < -690.0, 0.0, np.ldexp(series, exponent.astype(np.int32))).astype(x.dtype)


class NumPyWithExponential:
    """NumPy with `exponential` as its `exp`."""

    exp = staticmethod(exponential)

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)


@contextmanager
def same_exponential_everywhere() -> Iterator[None]:
    """Let `agreement` take its exponentials from here; needless if it did not use np.exp in float32 itself."""
    agreement.np = NumPyWithExponential()  # type: ignore[assignment, attr-defined]
    try:
        yield
    finally:
        agreement.np = np  # type: ignore[attr-defined]
