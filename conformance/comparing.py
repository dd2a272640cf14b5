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


class Difference(NamedTuple):
    """The first thing that is wrong with an outcome: its name, what it must be, what it is, and both in words."""

    what: str
    expected: str
    got: str
    text: str


@functools.lru_cache(maxsize=1024)
def expected(case: Case) -> dict[str, np.ndarray]:
    """What the reference gives; its attention outputs are the oracle."""
    outcome = run(THE_REFERENCE, case)
    if outcome.error is not None:
        raise outcome.error
    return outcome.arrays


def compare(case: Case, outcome: Outcome) -> Difference | None:
    """None if the outcome is right."""
    if case.is_refused:
        if isinstance(outcome.error, ValueError | TypeError):
            return None
        got = "no error" if outcome.error is None else repr(outcome.error)
        return Difference("error", "ValueError or TypeError", got, "this input must be refused, see section 14")
    if outcome.error is not None:
        return Difference("error", "a result", repr(outcome.error), "this input must not raise")
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
        return Difference(name, f"shape {right.shape}", f"shape {actual.shape}", f"{name} must have another shape")
    is_integer = right.dtype.kind == "i"
    if (actual.dtype.kind not in "iu") if is_integer else (actual.dtype != right.dtype):
        right_dtype = "integers" if is_integer else right.dtype.name
        return Difference(name, right_dtype, actual.dtype.name, f"{name} must have another dtype")
    if is_integer:
        differs = actual.astype(np.int64) != right
    else:
        bits = np.dtype(f"u{right.dtype.itemsize}")
        differs = np.ascontiguousarray(actual).view(bits) != np.ascontiguousarray(right).view(bits)
    if not differs.any():
        return None
    first = tuple(int(i) for i in np.argwhere(differs)[0])
    place = f"{name}[{', '.join(map(str, first))}]"
    text = f"{int(differs.sum()):,} of {differs.size:,} differ, the first at {place}"
    return Difference(name, show(right[first]), show(actual[first]), text)


def compare_output(case: Case, output: np.ndarray) -> Difference | None:
    """Attention by `attention_agreement`; a result of a wider dtype than the query's is rounded to it."""
    query, keys, values, counts, scale = oracle_arguments(case)
    shape = (*query.shape[:-1], values.shape[-1])
    if output.shape != shape:
        return Difference("output", f"shape {shape}", f"shape {output.shape}", "output must have another shape")
    if output.dtype.kind not in "fV" or output.dtype.itemsize < query.dtype.itemsize:
        return Difference("output", f"{query.dtype.name} or wider", output.dtype.name, "output must have another dtype")
    if not np.isfinite(output).all():
        return Difference("output", "finite numbers", "NaN or infinity", "output must be finite")
    agreement = attention_agreement(output.astype(query.dtype), query, keys, values, counts, scale=scale)
    if agreement.holds:
        return None
    worst = np.unravel_index(np.argmax(agreement.error - agreement.bound), agreement.error.shape)
    place = f"output[{', '.join(map(str, (*map(int, worst), '...')))}]"
    error, bound = agreement.error[worst], agreement.bound[worst]
    text = f"{place} is off by {error:.2g}, {error / bound:.3g} times the bound"
    return Difference("output", f"within {bound:.2g} of the oracle", f"off by {error:.2g}", text)


@functools.lru_cache(maxsize=1024)
def oracle_arguments(case: Case) -> tuple[Any, ...]:
    """Query, keys, values, counts and scale of the attention that a case amounts to."""
    oracle = OPERATIONS[case.operation].oracle
    if oracle is None:
        raise ValueError(f"case must be one of attention, got one of {case.operation}")
    return oracle(case)


def show(number: Any) -> str:
    """A number, floats with all their digits and in hexadecimal."""
    if np.asarray(number).dtype.kind == "i":
        return str(int(number))
    return f"{float(number)!r} ({float(number).hex()})"
