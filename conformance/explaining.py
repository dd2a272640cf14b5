"""Why an outcome is wrong: the mistake, known of the operation, that gives it too; and how the reference decides.

If the reference with a mistake gives what an implementation gave in most cases that failed, that is what went wrong
there.
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
    """How the reference decides a small case, step by step: lines on its first leading index, none of no decisions."""
    return list(OPERATIONS[case.operation].decisions(case))


def explain(failures: list[tuple[Case, Outcome]]) -> Mistake | None:
    """The mistake that gives most of these outcomes, all of one operation; None if none gives more than half."""
    most, best = len(failures) // 2, None
    for mistake in OPERATIONS[failures[0][0].operation].mistakes:
        given = sum(gives(mistake, *failure) for failure in failures)
        if given > most:
            most, best = given, mistake
    return best


def outcome_with(mistake: Mistake, case: Case) -> Outcome:
    """What the reference gives with a mistake."""
    with ExitStack() as stack:
        for module, name, part in mistake.patches:
            place = sys.modules[f"kvcluster.reference.{module}".rstrip(".")]
            stack.enter_context(patch.object(place, name, part))
        made = run(THE_REFERENCE, mistake.change(case))
    if "output" in made.arrays:
        made.arrays["output"] = mistake.restore(made.arrays["output"])
    return made


def gives(mistake: Mistake, case: Case, outcome: Outcome) -> bool:
    """Whether the mistake has this outcome, in all that can be compared."""
    made = outcome_with(mistake, case)
    if made.error is not None or outcome.error is not None:
        return False
    shared = [name for name in outcome.arrays if name in made.arrays]
    return all(is_alike(case, name, outcome.arrays[name], made.arrays[name]) for name in shared)


def is_alike(case: Case, name: str, mine: np.ndarray, made: np.ndarray) -> bool:
    """Equal, or of attention outputs: no farther apart than two right ones may be."""
    if mine.shape != made.shape:
        return False
    if name != "output":
        return bool(np.array_equal(mine, made)) and np.signbit(mine).tolist() == np.signbit(made).tolist()
    query, keys, values, counts, scale = oracle_arguments(case)
    bound = attention_agreement(np.zeros(made.shape, query.dtype), query, keys, values, counts, scale=scale).bound
    bound = bound + 2 * EPS[query.dtype.name] * np.abs(made).max(axis=(-2, -1))  # larger outputs are rounded by more
    return bool((np.abs(mine.astype(np.float64) - made).max(axis=(-2, -1)) <= bound).all())
