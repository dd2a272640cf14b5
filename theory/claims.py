"""What a claim is, and what its check reports."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Check", "Claim", "NotInstalledError"]


class NotInstalledError(Exception):
    """A check needs something that this installation lacks; the message says what."""


@dataclass(frozen=True)
class Check:
    """How far the worst of `cases` attempts to break `claim` got: `measured`, at most `bound` if the claim is true.

    `note` says what else came out, in numbers.
    """

    claim: str
    measured: str
    cases: int
    worst: float
    bound: float
    note: str = ""

    @property
    def holds(self) -> bool:
        return self.cases > 0 and self.worst <= self.bound


@dataclass(frozen=True)
class Claim:
    """A numbered claim of one of the pages, in one line, and the functions that try to break it.

    `checks` are named, `module.function`, and looked up when they run: so the claims can be listed without torch. One
    that reads a real model takes its name as `model`.
    """

    number: str
    page: str
    statement: str
    checks: tuple[str, ...]

    def find_check(self, name: str) -> Callable[..., Check]:
        """One of the `checks`.

        Raises
        ------
        ModuleNotFoundError : its module needs a package that is not there.
        """
        module, function = name.rsplit(".", 1)
        check: Callable[..., Check] = getattr(importlib.import_module(f"{__package__}.{module}"), function)
        return check
