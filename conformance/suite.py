"""The conformance suite: every case put to an implementation, and for what differs the cause as far as it is known."""

import time
from collections.abc import Callable
from typing import Any

from .case import Case
from .cases import all_cases
from .comparing import compare, expected
from .counterexamples import counterexample
from .explaining import Failure
from .implementation import Subject
from .operations import OPERATIONS
from .report import OperationReport, Report

__all__ = ["UnknownNameError", "check"]

MOST_ENDED = 5  # cases of one operation that may end their process; each start of another takes a second
MOST_REPEATED = 10  # failures of one operation that are tried again


class UnknownNameError(ValueError):
    """An operation or a result that there is not."""


def check(
    implementation: Subject,
    *,
    only: tuple[str, ...] = tuple(OPERATIONS),
    seed: int = 0,
    max_seconds: float = float("inf"),
    require: tuple[str, ...] = (),
    on_case: Callable[[], Any] = lambda: None,
    has_smallest: bool = True,
) -> Report:
    """Put every case of the operations `only` to an implementation.

    Parameters
    ----------
    implementation : an `Implementation`, or an `Isolated` one, which cannot change what it is compared with.
    only : names of `OPERATIONS`.
    seed : another seed gives the same cases other numbers.
    max_seconds : after this long no further case begins; the search for small counterexamples goes on for a while.
    require : names of operations, or of results, that must be there to be compared; what is missing differs.
    on_case : called after each case.
    has_smallest : look for small counterexamples; else they are the smallest of the cases.

    Raises
    ------
    ValueError : an unknown operation, or a required name that nothing has.
    DisturbedError : the implementation changed the arithmetic of its process.

    Notes
    -----
    A correct NumPy implementation takes a few seconds. The results are those of the reference, bit for bit; attention
    outputs are within the bound of `attention_agreement`.
    """
    unknown = sorted(set(only) - set(OPERATIONS))
    if unknown:
        raise UnknownNameError(f"only must be of {', '.join(OPERATIONS)}, got {', '.join(unknown)}")
    begun = time.monotonic()
    reports = {operation: OperationReport(operation) for operation in OPERATIONS if operation in only}
    failures: dict[str, list[Failure]] = {operation: [] for operation in reports}
    is_stopped = False
    for case in all_cases(tuple(reports), seed):
        report, case_begun = reports[case.operation], time.monotonic()
        if case.operation not in implementation.operations:
            report.skipped["no such name"] += 1
        elif len(report.ended) >= MOST_ENDED:
            report.skipped["too many cases ended their process"] += 1
        elif time.monotonic() - begun > max_seconds:
            report.skipped["no time left"] += 1
            is_stopped = True
        else:
            failure = put(implementation, case, report)
            failures[case.operation] += [failure] if failure is not None else []
        report.seconds += time.monotonic() - case_begun
        on_case()
    for operation, report in reports.items():
        report.missing = [name for name in require if report.lacks(name, implementation.operations)]
        if failures[operation]:
            report.counterexample = counterexample(
                implementation, failures[operation], report.kinds, seed if has_smallest else None
            )
    known = {*reports, *(name for report in reports.values() for name in report.known)}
    if nowhere := sorted(set(require) - known):
        raise UnknownNameError(f"require must name operations or results that are checked, got {', '.join(nowhere)}")
    return Report(
        implementation=implementation.name,
        operations=list(reports.values()),
        seconds=time.monotonic() - begun,
        is_stopped=is_stopped,
        seed=seed,
        dtypes=implementation.dtypes,
    )


def put(implementation: Subject, case: Case, report: OperationReport) -> Failure | None:
    """Ask for one case, and count what becomes of it; the failure if it is answered wrongly."""
    outcome = implementation.answer(case)
    if outcome.skipped is not None:
        report.skipped[outcome.skipped] += 1
        return None
    if outcome.ended is not None:
        report.ended.append(f"{case.name} {outcome.ended}")
        report.ended_case = report.ended_case or case
        return None
    difference = compare(case, outcome)
    report.n_cases += 1
    report.count_kind(case, is_failed=difference is not None)
    if not case.is_refused and outcome.error is None:
        for name in expected(case):
            (report.compared if name in outcome.arrays else report.not_shown)[name] += 1
    if difference is None:
        return None
    report.n_failed += 1
    text = f"{case.name}: {difference.text}"
    if report.n_failed <= MOST_REPEATED:
        again = implementation.answer(case)
        if again.ended is None and again.skipped is None and compare(case, again) is None:
            report.unsteady.append(case.name)
            text += "; unsteady: asked again, it is right"
    report.failed.append(text)
    return Failure(case, outcome, difference)
