"""What the pattern of the failures says where no known mistake explains them."""

import numpy as np

from .comparing import expected
from .explaining import Failure, is_of_numbers, nearly
from .inputs import EXACT_TIES, EXTREMES, TIES
from .operations import OPERATIONS

__all__ = ["pattern"]


def pattern(failed: list[Failure], *, is_all: bool = True) -> tuple[str | None, str | None]:
    """A cause and the paragraph of SPECIFICATION.md, for failures of one operation; None where nothing can be said.

    Unless these are all of them, nothing is said of what fails alone.
    """
    errors = {outcome.error.text for _, outcome, _ in failed if outcome.error is not None}
    if len(errors) == 1 and failed[0].outcome.error is not None:
        return f"every failing call raises {errors.pop()}", None
    kinds = {case.name.partition("-")[0] for case, _, _ in failed}
    names = {difference.what for _, _, difference in failed}
    if (explanation := OPERATIONS[failed[0].case.operation].pattern(kinds, names)) is not None:
        return explanation
    if all(difference.kind == "dtype" for _, _, difference in failed):
        return of_dtypes(failed), "1.4"
    if is_all and names == {"labels"} and kinds <= EXACT_TIES:
        return "only exact ties fail: the smallest index must win, so every sort must be stable", "2.5"
    if is_all and names == {"labels"} and kinds <= TIES:
        return "only ties and extremes fail: decisions need float64 similarities by halving sums", "2.1"
    moderate = [failure for failure in failed if failure.case.name.partition("-")[0] not in EXTREMES]
    if any(has_nan(failure) for failure in moderate):
        return "there is NaN: where a norm is 0 the similarity is 0", "4.2"
    if is_all and kinds == {"tiny"}:
        return "only tiny numbers fail: subnormal numbers must be kept, not flushed to zero", "2.1"
    if all(map(is_of_numbers, failed)) and moderate and all(map(is_nearly_right, moderate)):
        return "nearly equal, not bit for bit: float64, the order of additions and one rounding matter", "2.1"
    return None, None


def of_dtypes(failed: list[Failure]) -> str:
    """What is wrong with the dtypes, and whether the numbers are right but for that."""
    told = sorted({f"{name} must be {right}, not {got}" for _, _, (name, right, got, *_) in failed})
    is_right = all(
        np.array_equal(outcome.arrays[difference.what].astype(right.dtype), right)
        for case, outcome, difference in failed
        if (right := expected(case)[difference.what]).dtype.kind != "i" and difference.what != "output"
    )
    return f"another dtype: {'; '.join(told)}" + ("; the numbers are right but for that" if is_right else "")


def has_nan(failure: Failure) -> bool:
    arrays = failure.outcome.arrays.values()
    return any(bool(np.isnan(array).any()) for array in arrays if array.dtype == np.float64)


def is_nearly_right(failure: Failure) -> bool:
    """Whether all numbers share their leading bits with the right ones."""
    case, outcome, _ = failure
    return all(
        nearly(case, name, outcome.arrays[name], right)
        for name, right in expected(case).items()
        if name in outcome.arrays and right.dtype.kind != "i" and name != "output"
    )
