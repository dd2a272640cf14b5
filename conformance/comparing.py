"""Whether an outcome is right: decisions and centroids bit for bit, attention within its bound."""

import functools
from typing import Any, NamedTuple

import numpy as np

from kvcluster.reference.agreement import attention_agreement

from .case import Case
from .implementation import run
from .operations import OPERATIONS
from .port import THE_REFERENCE, Outcome

__all__ = ["Difference", "compare", "expected", "oracle_arguments"]

OF_SHAPES = ("shapes", "without-heads", "one-axis", "queries-dim", "no-queries", "no-numbers")
BAD_SHAPES = {f"refused-{name}" for name in OF_SHAPES}  # which many libraries refuse by a RuntimeError


class Difference(NamedTuple):
    """The first thing that is wrong with an outcome: its name, what it must be, what it is, both in words, its kind.

    The kinds are "refusal", "error", "shape", "dtype", "not finite" and "value".
    """

    what: str
    expected: str
    got: str
    text: str
    kind: str = "value"


@functools.lru_cache(maxsize=1024)
def expected(case: Case) -> dict[str, np.ndarray]:
    """What the reference gives; its attention outputs are the oracle."""
    outcome = run(THE_REFERENCE, case)
    if outcome.error is not None:
        raise ValueError(f"{case.operation} {case.name}: the reference raises {outcome.error.text}")
    return outcome.arrays


def compare(case: Case, outcome: Outcome) -> Difference | None:
    """None if the outcome is right, in what it shows."""
    error = outcome.error
    if case.is_refused:
        if error is not None and (error.is_refusal or (error.is_runtime_error and case.name in BAD_SHAPES)):
            return None
        got = "no error" if error is None else error.text
        text = "this input must be refused, see section 14"
        return Difference("error", "ValueError or TypeError", got, text, "refusal")
    if error is not None:
        return Difference("error", "a result", error.text, "this input must not raise", "error")
    for name, right in expected(case).items():
        if name in outcome.arrays:
            actual = outcome.arrays[name]
            difference = compare_output(case, actual) if name == "output" else compare_bits(name, actual, right)
            if difference is not None:
                return difference
    return None


def compare_bits(name: str, actual: np.ndarray, right: np.ndarray) -> Difference | None:
    """Integers may have any integer dtype; numbers must have the dtype and every bit."""
    if actual.shape != right.shape:
        return Difference(
            name, f"shape {right.shape}", f"shape {actual.shape}", f"{name} must have another shape", "shape"
        )
    is_integer = right.dtype.kind == "i"
    if (actual.dtype.kind not in "iu") if is_integer else (actual.dtype != right.dtype):
        right_dtype = "integers" if is_integer else right.dtype.name
        return Difference(name, right_dtype, actual.dtype.name, f"{name} must have another dtype", "dtype")
    if is_integer:
        differs = actual.astype(np.int64) != right
    else:
        bits = np.dtype(f"u{right.dtype.itemsize}")
        differs = np.ascontiguousarray(actual).view(bits) != np.ascontiguousarray(right).view(bits)
    if not differs.any():
        return None
    first = tuple(int(i) for i in np.argwhere(differs)[0])
    text = f"{int(differs.sum()):,} of {differs.size:,} differ, the first at {place_in(name, first)}"
    is_new_nan = not is_integer and bool((np.isnan(actual) & ~np.isnan(right)).any())
    return Difference(name, show(right[first]), show(actual[first]), text, "not finite" if is_new_nan else "value")


def compare_output(case: Case, output: np.ndarray) -> Difference | None:
    """Attention by `attention_agreement`; a result of a wider dtype than the query's is rounded to it."""
    query, keys, values, counts, scale = oracle_arguments(case)
    shape = (*query.shape[:-1], values.shape[-1])
    if output.shape != shape:
        return Difference(
            "output", f"shape {shape}", f"shape {output.shape}", "output must have another shape", "shape"
        )
    if output.dtype.kind not in "fV" or output.dtype.itemsize < query.dtype.itemsize:
        right = f"{query.dtype.name} or wider"
        return Difference("output", right, output.dtype.name, "output must have another dtype", "dtype")
    if not np.isfinite(output).all():
        first = tuple(int(i) for i in np.argwhere(~np.isfinite(output))[0])
        text = f"output must be finite, {place_in('output', first)} is not"
        return Difference("output", "finite numbers", "NaN or infinity", text, "not finite")
    agreement = attention_agreement(output.astype(query.dtype), query, keys, values, counts, scale=scale)
    if agreement.holds:
        return None
    worst = np.unravel_index(np.argmax(agreement.error - agreement.bound), agreement.error.shape)
    right, actual = expected(case)["output"][worst], output[worst]
    first = np.unravel_index(np.abs(actual.astype(np.float64) - right).argmax(), right.shape)
    error, bound = agreement.error[worst], agreement.bound[worst]
    place = place_in("output", (*map(int, worst), *map(int, first)))
    text = f"{place} is off by {error:.2g}, {error / bound if bound else np.inf:.3g} times the bound"
    return Difference("output", f"within {bound:.2g} of {show(right[first])}", show(actual[first]), text)


def place_in(name: str, index: tuple[int, ...]) -> str:
    return f"{name}[{', '.join(map(str, index))}]" if index else name


@functools.lru_cache(maxsize=1024)
def oracle_arguments(case: Case) -> tuple[Any, ...]:
    """Query, keys, values, counts and scale of the attention that a case amounts to."""
    oracle = OPERATIONS[case.operation].oracle
    if oracle is None:
        raise ValueError(f"case must be one of attention, got one of {case.operation}")
    return oracle(case)


def show(number: Any) -> str:
    """A number, floats with all their digits and in hexadecimal."""
    if np.asarray(number).dtype.kind in "iu":
        return str(int(number))
    return f"{float(number)!r} ({float(number).hex()})"
