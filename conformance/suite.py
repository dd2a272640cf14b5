"""The conformance suite: every case put to an implementation, and for what differs the cause as far as it is known."""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .case import Case
from .cases import all_cases
from .comparing import Difference, compare, expected
from .explaining import explain
from .implementation import Implementation, run
from .operations import OPERATIONS
from .patterns import pattern
from .port import Outcome
from .shrinking import smallest_case

__all__ = ["Counterexample", "OperationReport", "Report", "check"]

N_EXPLAINED = 8  # about so many failures, of which a cause must give most


@dataclass(frozen=True)
class Counterexample:
    """A case that differs, as small as could be found.

    Attributes
    ----------
    case, difference : what was asked, and the first thing that is wrong.
    expected, got : arrays by name; empty where the call raised, or was to raise.
    cause : what is wrong in the implementation, in words; None if nothing known explains it.
    rule : the paragraph of SPECIFICATION.md that is broken, or its section.
    """

    case: Case
    difference: Difference
    expected: dict[str, np.ndarray]
    got: dict[str, np.ndarray]
    cause: str | None
    rule: str


@dataclass
class OperationReport:
    """What became of the cases of one operation; `skipped` counts by reason those not put to the implementation."""

    operation: str
    n_cases: int = 0
    n_failed: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    counterexample: Counterexample | None = None
    failed: list[str] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        if self.n_failed:
            return "differs"
        return "agrees" if self.n_cases else "not checked"


@dataclass(frozen=True)
class Report:
    """What a whole run found; `is_stopped`: there was no time for all cases."""

    implementation: str
    operations: list[OperationReport]
    seconds: float
    is_stopped: bool

    @property
    def agrees(self) -> bool:
        """Whether something was checked and nothing differs."""
        return any(result.n_cases for result in self.operations) and not any(
            result.n_failed for result in self.operations
        )


def check(
    implementation: Implementation,
    *,
    only: tuple[str, ...] = tuple(OPERATIONS),
    seed: int = 0,
    max_seconds: float = float("inf"),
    on_case: Callable[[], Any] = lambda: None,
    has_smallest: bool = True,
) -> Report:
    """Put every case of the operations `only` to an implementation.

    Parameters
    ----------
    implementation : see `Implementation`.
    only : names of `OPERATIONS`.
    seed : another seed gives the same cases other numbers.
    max_seconds : after this long no further case begins; the search for small counterexamples goes on for a while.
    on_case : called after each case.
    has_smallest : look for small counterexamples; else they are the smallest of the cases.

    Raises
    ------
    ValueError : an unknown operation.

    Notes
    -----
    A correct NumPy implementation takes a few seconds. The results are those of the reference, bit for bit; attention
    outputs are within the bound of `attention_agreement`.
    """
    unknown = sorted(set(only) - set(OPERATIONS))
    if unknown:
        raise ValueError(f"only must be of {', '.join(OPERATIONS)}, got {', '.join(unknown)}")
    begun = time.monotonic()
    reports = {operation: OperationReport(operation) for operation in OPERATIONS if operation in only}
    failures: dict[str, list[tuple[Case, Outcome, Difference]]] = {operation: [] for operation in reports}
    is_stopped = False
    for case in all_cases(tuple(reports), seed):
        report = reports[case.operation]
        reason = implementation.accepts(case)
        if reason is None and time.monotonic() - begun > max_seconds:
            reason, is_stopped = "no time left", True
        if reason is not None:
            report.skipped[reason] += 1
        else:
            outcome = run(implementation, case)
            difference = compare(case, outcome)
            report.n_cases += 1
            if difference is not None:
                report.n_failed += 1
                report.failed.append(f"{case.name}: {difference.text}")
                failures[case.operation].append((case, outcome, difference))
        on_case()
    for operation, failed in failures.items():
        if failed:
            reports[operation].counterexample = counterexample(implementation, failed, seed if has_smallest else None)
    return Report(implementation.name, list(reports.values()), time.monotonic() - begun, is_stopped)


def differs(implementation: Implementation, case: Case) -> bool:
    """Whether the case can be put to the implementation, and is answered wrongly.

    Numbers so large that a float32 baseline overflows have no bound, so no answer to them is right: they do not count.
    """
    if implementation.accepts(case) is not None or compare(case, run(implementation, case)) is None:
        return False
    return compare(case, Outcome(expected(case))) is None


def counterexample(
    implementation: Implementation, failed: list[tuple[Case, Outcome, Difference]], seed: int | None
) -> Counterexample:
    """The smallest failure that can be found, and what explains all failures."""
    by_size = sorted(failed, key=lambda failure: sum(array.size for array in failure[0].arrays.values()))
    case, outcome, difference = by_size[0]
    operation = OPERATIONS[case.operation]
    rule = str(operation.section)
    results = [failure for failure in by_size if not failure[0].is_refused]
    if not results:
        return Counterexample(case, difference, {}, outcome.arrays, "bad input is not refused", "14")
    # what is wrong without options makes cases with options wrong in ways of their own
    results = [failure for failure in results if not operation.has_option(failure[0])] or results
    mistake = explain([(case, outcome) for case, outcome, _ in results[:: max(1, len(results) // N_EXPLAINED)]])
    cause = (mistake.cause, mistake.rule) if mistake is not None else pattern(results)
    case, outcome, difference = results[0]
    if seed is not None:
        small = smallest_case(case.operation, lambda case: differs(implementation, case), seed)
        if small is not None:
            small_outcome = run(implementation, small)
            small_difference = compare(small, small_outcome)
            if small_difference is not None:
                case, outcome, difference = small, small_outcome, small_difference
    return Counterexample(case, difference, expected(case), outcome.arrays, cause[0], cause[1] or rule)
