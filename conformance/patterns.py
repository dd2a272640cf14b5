"""What the pattern of the failures says where no known mistake explains them."""

import numpy as np

from .case import Case
from .comparing import Difference, expected
from .inputs import EXTREMES, TIES
from .operations import OPERATIONS
from .port import Outcome

__all__ = ["pattern"]

Failure = tuple[Case, Outcome, Difference]
LEAST_SHARED_BITS = 18


def pattern(failed: list[Failure]) -> tuple[str | None, str | None]:
    """A cause and the paragraph of SPECIFICATION.md, for failures of one operation; None where nothing can be said."""
    errors = {repr(outcome.error) for _, outcome, _ in failed}
    if len(errors) == 1 and failed[0][1].error is not None:
        return f"every failing call raises {errors.pop()}", None
    kinds = {case.name.partition("-")[0] for case, _, _ in failed}
    names = {difference.what for _, _, difference in failed}
    if (explanation := OPERATIONS[failed[0][0].operation].pattern(kinds, names)) is not None:
        return explanation
    if names == {"labels"} and kinds <= TIES:
        return "only ties and extremes fail: decisions need float64 similarities by halving sums", "2.1"
    moderate = [failure for failure in failed if failure[0].name.partition("-")[0] not in EXTREMES]
    if any(has_nan(outcome) for _, outcome, _ in moderate):
        return "there is NaN: where a norm is 0 the similarity is 0", "4.2"
    if all(map(is_of_numbers, failed)) and moderate and all(map(nearly_equal, moderate)):
        return "nearly equal, not bit for bit: float64, the order of additions and one rounding matter", "2.1"
    return None, None


def is_of_numbers(failure: Failure) -> bool:
    """Whether what differs is neither a decision nor attention, which has a bound."""
    case, _, difference = failure
    right = expected(case).get(difference.what)
    return right is not None and right.dtype.kind != "i" and difference.what != "output"


def has_nan(outcome: Outcome) -> bool:
    return any(bool(np.isnan(array).any()) for array in outcome.arrays.values() if array.dtype == np.float64)


def nearly_equal(failure: Failure) -> bool:
    """Whether all numbers share their leading bits with the right ones."""
    case, outcome, _ = failure
    for name, right in expected(case).items():
        actual = outcome.arrays.get(name)
        if actual is None or right.dtype.kind == "i" or name == "output":
            continue
        wide = right.astype(np.float64)
        allowed = 2.0**-LEAST_SHARED_BITS * np.abs(wide).max(initial=0)
        if actual.shape != wide.shape or np.abs(actual.astype(np.float64) - wide).max(initial=0) > allowed:
            return False
    return True
