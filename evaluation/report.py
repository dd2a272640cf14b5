"""What a benchmark says: tables whose lines carry their target, and the same numbers as JSON."""

from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

__all__ = ["Claim", "Line", "Section", "print_sections", "with_interval"]


@dataclass(frozen=True)
class Claim:
    """A measured number and the most it may be, or the least."""

    name: str
    measured: float
    target: float
    is_least: bool = False

    @property
    def is_met(self) -> bool:
        return self.measured >= self.target if self.is_least else self.measured <= self.target


@dataclass(frozen=True)
class Line:
    """One line of a table, and the claim it decides, if any."""

    cells: tuple[str, ...]
    claim: Claim | None = None
    show: str = "{:g}"  # how the target is written


@dataclass(frozen=True)
class Section:
    """One table: title, what its columns say, its lines, a note below, and the raw numbers."""

    title: str
    columns: tuple[str, ...]
    lines: list[Line]
    note: str = ""
    numbers: dict[str, Any] = field(default_factory=dict)

    @property
    def claims(self) -> list[Claim]:
        return [line.claim for line in self.lines if line.claim is not None]

    def as_json(self) -> dict[str, Any]:
        claims = [vars(claim) | {"is_met": claim.is_met} for claim in self.claims]
        return {"title": self.title, "claims": claims, "note": self.note, **self.numbers}


def print_sections(console: Console, sections: list[Section]) -> None:
    """Print every table, then how many targets are met, if there are any."""
    for section in sections:
        table = Table(title=section.title, title_justify="left", caption=section.note, caption_justify="left")
        for i, name in enumerate((*section.columns, "target", "met")):
            table.add_column(name, justify="left" if i == 0 else "right")
        for line in section.lines:
            table.add_row(*line.cells, *verdict(line))
        console.print(table)
    claims = [claim for section in sections for claim in section.claims]
    if not claims:
        return
    missed = [claim.name for claim in claims if not claim.is_met]
    console.print(
        f"{len(claims) - len(missed)} of {len(claims)} targets met" + (": missed " * bool(missed)) + "; ".join(missed)
    )


def verdict(line: Line) -> tuple[str, str]:
    """The last two cells of a line."""
    if line.claim is None:
        return "none", ""
    return ("at least " if line.claim.is_least else "at most ") + line.show.format(
        line.claim.target
    ), "yes" if line.claim.is_met else "[bold]NO[/bold]"


def with_interval(estimate: dict[str, Any] | None, *, digits: int = 3, sign: str = "", to: str = " to ") -> str:
    """An estimate of `evaluation.statistics` as text; nothing if there is none.

    >>> with_interval({"value": 0.75, "low": 0.5, "high": 1.0}, digits=2)
    '0.75 (0.50 to 1.00)'
    >>> with_interval({"value": 0.75, "low": None, "high": None}, sign="+")
    '+0.750'
    """
    if not estimate or estimate["value"] is None:
        return ""
    value, *ends = (
        "" if estimate[name] is None else f"{estimate[name]:{sign}.{digits}f}" for name in ("value", "low", "high")
    )
    return f"{value} ({to.join(ends)})" if all(ends) else value
