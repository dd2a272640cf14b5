"""What is wrong in the failures of one operation: what explains them, one after the other, and a small case."""

from collections import Counter

from .case import Case
from .comparing import compare, expected
from .explaining import Failure, Finding, explain, reproduces
from .implementation import Subject
from .inputs import EXTREMES, TIES
from .operations import OPERATIONS
from .patterns import pattern
from .port import Outcome
from .report import Counterexample, kind_of
from .shrinking import smallest_case

__all__ = ["counterexample", "differs"]

N_EXPLAINED = 8  # about so many failures, of which a cause must give most
N_LEFT = 40  # about so many, to see what else is wrong
MOST_FINDINGS = 4
MOST_KINDS = 6  # that are named
STAGES = ("inputs without near ties", "ties", *sorted(EXTREMES))


def counterexample(
    implementation: Subject, failed: list[Failure], kinds: dict[str, list[int]], seed: int | None
) -> Counterexample:
    """The smallest failure that can be found, and what explains all failures; of `kinds`, how many cases failed."""
    by_size = sorted(failed, key=lambda failure: sum(array.size for array in failure.case.arrays.values()))
    operation = OPERATIONS[by_size[0].case.operation]
    results = [failure for failure in by_size if not failure.case.is_refused]
    if not results:
        case, outcome, difference = by_size[0]
        where = where_it_fails(by_size, kinds)
        findings: tuple[Finding, ...] = (Finding("bad input is not refused", "14", where),)
        return Counterexample(case, difference, {}, outcome.arrays, findings, "14", lines_of(outcome))
    # what is wrong without options makes cases with options wrong in ways of their own
    results = [failure for failure in results if not operation.has_option(failure.case)] or results
    findings = tuple(findings_of(results, kinds))
    if len(results) < len(by_size) and any(failure.case.is_refused for failure in by_size):
        refused = [failure for failure in by_size if failure.case.is_refused]
        findings = (*findings, Finding("bad input is not refused", "14", where_it_fails(refused, kinds)))
    case, outcome, difference = results[0]
    if seed is not None:
        small = smaller(implementation, results[0], seed)
        case, outcome, difference = small if small is not None else results[0]
    rule = findings[0].rule or str(operation.section)
    return Counterexample(case, difference, expected(case), outcome.arrays, findings, rule, lines_of(outcome))


def lines_of(outcome: Outcome) -> tuple[str, ...]:
    return () if outcome.error is None else outcome.error.lines


def smaller(implementation: Subject, failure: Failure, seed: int) -> Failure | None:
    """A smaller case that fails in the same way; None if none is found."""
    what, kind = failure.difference.what, failure.difference.kind
    small = smallest_case(failure.case, lambda case: fails_so(implementation, case, what, kind) is not None, seed)
    return None if small is None else fails_so(implementation, small, what, kind)


def fails_so(implementation: Subject, case: Case, what: str, kind: str) -> Failure | None:
    """The failure of a case in this result and of this kind, if it is one that the reference does not fail itself."""
    outcome = implementation.answer(case)
    if outcome.skipped is not None or outcome.ended is not None:
        return None
    difference = compare(case, outcome)
    if difference is None or (difference.what, difference.kind) != (what, kind):
        return None
    return Failure(case, outcome, difference) if compare(case, Outcome(expected(case))) is None else None


def differs(implementation: Subject, case: Case) -> bool:
    """Whether the case can be put to the implementation, and is answered wrongly, while the reference passes it."""
    outcome = implementation.answer(case)
    if outcome.skipped is not None or outcome.ended is not None or compare(case, outcome) is None:
        return False
    return compare(case, Outcome(expected(case))) is None


def findings_of(failed: list[Failure], kinds: dict[str, list[int]]) -> list[Finding]:
    """What explains the failures: if not one mistake, then stage by stage, those without near ties first."""
    mistake = explain(sampled(failed, N_EXPLAINED))
    where = where_it_fails(failed, kinds)
    if mistake is None:
        cause, rule = pattern(failed)
        if cause is not None:
            return [Finding(cause, rule, where)]
        return by_stages(failed, kinds) or [Finding(None, None, where)]
    found = [Finding(mistake.cause, mistake.rule, where)]
    tried = sampled(failed, N_LEFT)
    left = [failure for failure in tried if not reproduces(mistake, failure)]
    if len(left) < len(tried) and left:  # else it gives the numbers nearly
        found += [finding for finding in by_stages(left, kinds) if finding.cause not in (None, mistake.cause)]
    return found[:MOST_FINDINGS]


def by_stages(failed: list[Failure], kinds: dict[str, list[int]]) -> list[Finding]:
    """What explains the failures of each stage which no stage before does; the largest deviation first."""
    found: list[Finding] = []
    known: list[str | None] = []
    for stage in STAGES:
        of_stage = [failure for failure in failed if stage_of(failure.case) == stage]
        mistake = explain(sampled(of_stage, N_EXPLAINED)) if of_stage else None
        cause, rule = (mistake.cause, mistake.rule) if mistake is not None else (None, None)
        if of_stage and mistake is None:
            cause, rule = pattern(of_stage, is_all=False)
        if of_stage and cause is None and stage == STAGES[0]:
            cause = another_algorithm(of_stage, kinds)
        if cause is not None and cause not in known:
            known.append(cause)
            found.append(Finding(cause, rule, where_it_fails(of_stage, kinds)))
    return found


def another_algorithm(failed: list[Failure], kinds: dict[str, list[int]]) -> str | None:
    """In which decisions it is another algorithm, where these do not depend on the last bits; None for numbers."""
    whats = Counter(failure.difference.what for failure in failed)
    what = whats.most_common(1)[0][0]
    decided = [failure for failure in failed if failure.difference.what == what]
    right = [expected(failure.case).get(what) for failure in decided]
    if any(array is None or array.dtype.kind != "i" for array in right):
        return None
    return f"another algorithm or rule: {what} differ in {len(decided)} cases without near ties, by no known mistake"


def stage_of(case: Case) -> str:
    kind = case.name.partition("-")[0]
    return kind if kind in EXTREMES else STAGES[1] if kind in TIES else STAGES[0]


def sampled(failed: list[Failure], number: int) -> list[Failure]:
    return failed[:: max(1, len(failed) // number)]


def where_it_fails(failed: list[Failure], kinds: dict[str, list[int]]) -> str:
    """The kinds of input that fail, and how many of their cases, as far as these failures are of them."""
    those = {kind_of(failure.case) for failure in failed} & set(kinds)
    if those and those == set(kinds) - {"bad input"}:
        return "every kind of input"
    most_first = sorted(those, key=lambda kind: (-kinds[kind][1] / kinds[kind][0], -kinds[kind][0], kind))
    told = [f"{kind} ({kinds[kind][1]} of {kinds[kind][0]})" for kind in most_first[:MOST_KINDS]]
    if len(most_first) > MOST_KINDS:
        told.append(f"{len(most_first) - MOST_KINDS} kinds more")
    is_only = {kind for kind, (_, n_failed) in kinds.items() if n_failed} == those and len(those) < len(kinds)
    return ("only " if is_only and told else "") + ", ".join(told)
