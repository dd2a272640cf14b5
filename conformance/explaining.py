"""Why an outcome is wrong: the known mistake of its operation that gives it too; and how the reference decides.

If the reference with a mistake reproduces most of an implementation's failures, that mistake is taken for their cause.
"""

import sys
from contextlib import ExitStack
from unittest.mock import patch

import numpy as np

from kvcluster.reference.agreement import EPS, attention_agreement

from .case import Case
from .comparing import oracle_arguments
from .implementation import run
from .mistake import Mistake
from .operations import OPERATIONS
from .port import THE_REFERENCE, Outcome

__all__ = ["decisions", "explain", "outcome_with"]


def decisions(case: Case) -> list[str]:
    """How the reference decides a small case, step by step: lines on its first leading index, if any."""
    return list(OPERATIONS[case.operation].decisions(case))


def explain(failures: list[tuple[Case, Outcome]]) -> Mistake | None:
    """The mistake that gives most of these outcomes, all of one operation; None if none gives more than half.

    Of mistakes that give equally many, the first that also gives the first of them.
    """
    mistakes = OPERATIONS[failures[0][0].operation].mistakes
    gives_first = [reproduces(mistake, *failures[0]) for mistake in mistakes]
    most, best = len(failures) // 2, None
    for index in sorted(range(len(mistakes)), key=lambda index: not gives_first[index]):
        n_explained = int(gives_first[index])
        for n_tried, failure in enumerate(failures[1:], 1):
            if n_explained + len(failures) - n_tried <= most:
                break  # it cannot explain more any longer
            n_explained += reproduces(mistakes[index], *failure)
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


def reproduces(mistake: Mistake, case: Case, outcome: Outcome) -> bool:
    """Whether the reference with the mistake gives this outcome, in all that can be compared."""
    mistaken = outcome_with(mistake, case)
    if mistaken.error is not None or outcome.error is not None:
        return False
    shared = [name for name in outcome.arrays if name in mistaken.arrays]
    return all(is_alike(case, name, outcome.arrays[name], mistaken.arrays[name]) for name in shared)


def is_alike(case: Case, name: str, actual: np.ndarray, theirs: np.ndarray) -> bool:
    """Equal, signs of zeros too; attention outputs: no farther apart than two right ones may be."""
    if actual.shape != theirs.shape:
        return False
    if name != "output":
        return bool(np.array_equal(actual, theirs)) and np.signbit(actual).tolist() == np.signbit(theirs).tolist()
    query, keys, values, counts, scale = oracle_arguments(case)
    bound = attention_agreement(np.zeros(theirs.shape, query.dtype), query, keys, values, counts, scale=scale).bound
    # larger outputs are rounded by more
    bound = bound + 2 * EPS[query.dtype.name] * np.abs(theirs).max(axis=(-2, -1))
    return bool((np.abs(actual.astype(np.float64) - theirs).max(axis=(-2, -1)) <= bound).all())
