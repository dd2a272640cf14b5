"""What a run of the suite found, before it is shown or written."""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from .case import Case
from .comparing import Difference
from .explaining import Finding

__all__ = ["Counterexample", "OperationReport", "Report", "kind_of"]


@dataclass(frozen=True)
class Counterexample:
    """A case that differs, as small as could be found.

    Attributes
    ----------
    case, difference : what was asked, and the first thing that is wrong.
    expected, got : arrays by name; empty where the call raised, or was to raise.
    findings : what is wrong in the implementation, the largest deviation first.
    rule : the paragraph of SPECIFICATION.md that is broken, or its section.
    lines : where it raised, if it did.
    """

    case: Case
    difference: Difference
    expected: dict[str, np.ndarray]
    got: dict[str, np.ndarray]
    findings: tuple[Finding, ...]
    rule: str
    lines: tuple[str, ...] = ()

    @property
    def cause(self) -> str | None:
        """The first finding in words; None if nothing known explains it."""
        return self.findings[0].cause if self.findings else None


@dataclass
class OperationReport:
    """What became of the cases of one operation.

    Attributes
    ----------
    n_cases, n_failed, failed : cases that were compared; those that differ, and in what.
    skipped : by reason, how many were not put to the implementation.
    ended, ended_case : cases that gave no answer: their process died, or they took too long; the first of them.
    compared, not_shown : by result, how many cases showed it, and how many did not.
    missing : what was required, and was not shown in every case.
    unsteady : cases that differ at first and are right when they are asked again.
    kinds : by kind of input, how many cases there were, and how many failed.
    """

    operation: str
    n_cases: int = 0
    n_failed: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    counterexample: Counterexample | None = None
    failed: list[str] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)
    ended_case: Case | None = None
    compared: Counter[str] = field(default_factory=Counter)
    not_shown: Counter[str] = field(default_factory=Counter)
    missing: list[str] = field(default_factory=list)
    unsteady: list[str] = field(default_factory=list)
    kinds: dict[str, list[int]] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def verdict(self) -> str:
        """In one word or a few; "agrees" only if everything was compared."""
        if self.n_failed or self.missing:
            return "differs"
        if self.ended or self.skipped["no time left"]:
            return "cannot be told"
        if not self.n_cases:
            return "not checked"
        return "agrees in part" if self.not_shown else "agrees"

    @property
    def known(self) -> set[str]:
        """The results that there were to be compared."""
        return {*self.compared, *self.not_shown}

    def lacks(self, name: str, operations: tuple[str, ...]) -> bool:
        """Whether a required operation or result is not there in some case that has it."""
        if name == self.operation:
            return self.operation not in operations or not self.n_cases
        return self.not_shown[name] > 0

    def count_kind(self, case: Case, *, is_failed: bool) -> None:
        counts = self.kinds.setdefault(kind_of(case), [0, 0])
        counts[0] += 1
        counts[1] += is_failed


@dataclass(frozen=True)
class Report:
    """What a whole run found; `is_stopped`: there was no time for all cases."""

    implementation: str
    operations: list[OperationReport]
    seconds: float
    is_stopped: bool
    seed: int = 0
    dtypes: tuple[str, ...] = ()

    @property
    def differs(self) -> bool:
        return any(result.verdict == "differs" for result in self.operations)

    @property
    def agrees(self) -> bool:
        """Whether something was checked, nothing differs, and no answer is missing."""
        verdicts = {result.verdict for result in self.operations}
        return bool(verdicts & {"agrees", "agrees in part"}) and not verdicts & {"differs", "cannot be told"}


def kind_of(case: Case) -> str:
    """The kind of a case's numbers and their dtype, as in "tiny float32"."""
    first = "bad input" if case.is_refused else case.name.partition("-")[0]
    floats = [array.dtype.name for array in case.arrays.values() if array.dtype.kind in "fV"]
    return f"{first} {floats[0]}" if floats and not case.is_refused else first
