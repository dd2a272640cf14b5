"""Why an outcome is wrong: the known mistake of its operation that gives it too; and how the reference decides.

If the reference with a mistake reproduces most of an implementation's failures, that mistake is taken for their cause.
A mistake that changes nothing in a case explains nothing in it.
"""

import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import NamedTuple
from unittest.mock import patch

import numpy as np

from kvcluster.reference.agreement import EPS, attention_agreement

from .case import Case
from .comparing import Difference, compare, expected, oracle_arguments
from .implementation import run
from .mistake import Mistake
from .operations import OPERATIONS
from .port import THE_REFERENCE, Outcome

__all__ = ["Failure", "Finding", "decisions", "explain", "nearly", "outcome_with", "reproduces", "without_sizes"]

LEAST_SHARED_BITS = 18
SIZES = ("nbytes", "bytes_of_count")  # which follow from how something is stored, whatever it is


class Failure(NamedTuple):
    """A case, what came of it, and what is wrong with that."""

    case: Case
    outcome: Outcome
    difference: Difference


class Finding(NamedTuple):
    """What is wrong in words, None if nothing known explains it; the paragraph; and where it shows."""

    cause: str | None
    rule: str | None
    where: str


def decisions(case: Case) -> list[str]:
    """How the reference decides a small case, step by step: lines on its first leading index, if any."""
    return list(OPERATIONS[case.operation].decisions(case))


def explain(failures: list[Failure]) -> Mistake | None:
    """The mistake that gives most of these outcomes, all of one operation; None if none gives more than half.

    Of mistakes that give equally many, the first that also gives the first of them. If none does, a mistake counts that
    gives nearly the same numbers, where those are not nearly right. Sizes in bytes count where some mistake gives them.
    """
    in_any_memory = [each._replace(outcome=without_sizes(each.outcome)) for each in failures]
    of_numbers = [each for each in in_any_memory if is_of_numbers(each)]
    return best_of(failures, same) or best_of(in_any_memory, same) or best_of(of_numbers, nearly)


Alike = Callable[[Case, str, np.ndarray, np.ndarray], bool]


def best_of(failures: list[Failure], is_alike: Alike) -> Mistake | None:
    """The mistake that gives most of these outcomes up to `is_alike`."""
    if not failures:
        return None
    mistakes = OPERATIONS[failures[0].case.operation].mistakes
    gives_first = [reproduces(mistake, failures[0], is_alike) for mistake in mistakes]
    most, best = len(failures) // 2, None
    for index in sorted(range(len(mistakes)), key=lambda index: not gives_first[index]):
        n_explained = int(gives_first[index])
        for n_tried, failure in enumerate(failures[1:], 1):
            if n_explained + len(failures) - n_tried <= most:
                break  # it cannot explain more any longer
            n_explained += reproduces(mistakes[index], failure, is_alike)
        if n_explained > most:
            most, best = n_explained, mistakes[index]
    return best


def outcome_with(mistake: Mistake, case: Case) -> Outcome:
    """What the reference gives with a mistake."""
    with ExitStack() as stack:
        for module, name, part in mistake.patches:
            place = sys.modules[f"kvcluster.reference.{module}".rstrip(".")]
            stack.enter_context(patch.object(place, name, part))
        outcome = run(THE_REFERENCE, mistake.change(case))
    if "output" in outcome.arrays:
        outcome.arrays["output"] = mistake.restore(outcome.arrays["output"])
    return outcome


def same(case: Case, name: str, actual: np.ndarray, theirs: np.ndarray) -> bool:
    """Equal, signs of zeros and dtypes too; attention outputs: no farther apart than two right ones may be."""
    if actual.shape != theirs.shape:
        return False
    if name != "output":
        is_dtype = actual.dtype == theirs.dtype or theirs.dtype.kind == "i"
        is_equal = np.array_equal(actual, theirs, equal_nan=theirs.dtype.kind == "f")
        return is_dtype and is_equal and np.signbit(actual).tolist() == np.signbit(theirs).tolist()
    query, keys, values, counts, scale = oracle_arguments(case)
    bound = attention_agreement(np.zeros(theirs.shape, query.dtype), query, keys, values, counts, scale=scale).bound
    # larger outputs are rounded by more
    bound = bound + 2 * EPS[query.dtype.name] * np.abs(theirs).max(axis=(-2, -1))
    return bool((np.abs(actual.astype(np.float64) - theirs).max(axis=(-2, -1)) <= bound).all())


def nearly(case: Case, name: str, actual: np.ndarray, theirs: np.ndarray) -> bool:
    """The same shape and integers, and numbers that share their leading bits; none is NaN."""
    if name == "output" or theirs.dtype.kind == "i" or actual.shape != theirs.shape:
        return same(case, name, actual, theirs)
    wide = theirs.astype(np.float64)
    allowed = 2.0**-LEAST_SHARED_BITS * np.abs(wide).max(initial=0)
    return bool((np.abs(actual.astype(np.float64) - wide) <= allowed).all())


def reproduces(mistake: Mistake, failure: Failure, is_alike: Alike = same) -> bool:
    """Whether the reference with the mistake gives this outcome, in all that can be compared, and the right one not."""
    case, outcome, _ = failure
    if outcome.error is not None:
        return False
    mistaken = outcome_with(mistake, case)
    if mistaken.error is not None or mistaken.ended is not None:
        return False
    shared = {name: array for name, array in mistaken.arrays.items() if name in outcome.arrays}
    if not all(is_alike(case, name, outcome.arrays[name], array) for name, array in shared.items()):
        return False
    if is_alike is same:
        return compare(case, Outcome(shared)) is not None
    right = expected(case)
    return not all(is_alike(case, name, outcome.arrays[name], right[name]) for name in shared if name in right)


def without_sizes(outcome: Outcome) -> Outcome:
    """An outcome without sizes in bytes, which the same mistake may leave right in memory of another kind."""
    return outcome._replace(arrays={name: array for name, array in outcome.arrays.items() if name not in SIZES})


def is_of_numbers(failure: Failure) -> bool:
    """Whether what differs is neither a decision nor attention, which has a bound."""
    right = expected(failure.case).get(failure.difference.what)
    return right is not None and right.dtype.kind != "i" and failure.difference.what != "output"
