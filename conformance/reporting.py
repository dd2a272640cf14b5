"""A report for people: a table, and a panel for each operation that differs."""

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from .explaining import decisions
from .report import Counterexample, OperationReport, Report

__all__ = ["show"]

MOST_WRITTEN = 64  # numbers of an array that is written in full
COLOURS = {"agrees": "green", "agrees in part": "green", "differs": "red", "cannot be told": "yellow"}


def show(console: Console, report: Report) -> None:
    """A table, a panel for each operation that differs, and what was not compared."""
    table = Table(title=escape(f"{report.implementation} against the reference ({report.seconds:.1f} s)"))
    for column in ("operation", "cases", "differ", "not put to it", "not shown", "verdict"):
        table.add_column(column, justify="right" if column in ("cases", "differ") else "left")
    for result in report.operations:
        skipped = ", ".join(f"{number}: {reason}" for reason, number in result.skipped.items())
        skipped += (", " if skipped else "") + f"{len(result.ended)}: no answer" if result.ended else ""
        colour = COLOURS.get(result.verdict, "dim")
        verdict = f"[{colour}]{result.verdict}[/{colour}]"
        numbers = str(result.n_cases), str(result.n_failed)
        table.add_row(result.operation, *numbers, escape(skipped), ", ".join(result.not_shown), verdict)
    console.print(table)
    for result in report.operations:
        lines = lines_of(result)
        if lines:
            style = "red" if result.verdict == "differs" else "yellow"
            title = f"{result.operation} {result.verdict}"
            console.print(Panel(Text("\n".join(lines)), title=title, title_align="left", border_style=style))
    if any(result.not_shown for result in report.operations):
        console.print("What is not shown was not compared; --require NAME makes it a failure.")
    if report.is_stopped:
        console.print("Stopped by --max-seconds: not all cases were checked.")


def lines_of(result: OperationReport) -> list[str]:
    """All that there is to be said about one operation beside its row of the table."""
    lines = lines_on(result.counterexample) if result.counterexample is not None else []
    if result.missing:
        lines.append(f"Required, and not shown in every case: {', '.join(result.missing)}")
    if result.unsteady:
        lines.append(f"Unsteady, wrong at first and right when asked again: {', '.join(result.unsteady)}")
    lines += [f"No answer: {text}" for text in result.ended]
    return lines


def lines_on(counterexample: Counterexample) -> list[str]:
    """What is wrong, the case, what must come out, what does, and how the reference decides."""
    lines = []
    for number, finding in enumerate(counterexample.findings, 1):
        title = "What is wrong" if number == 1 else "Then"
        lines.append(f"{title}: {finding.cause or 'no known mistake explains it'}")
        lines.append(f"  Rule: {finding.rule or counterexample.rule} of SPECIFICATION.md")
        lines += [f"  Fails: {finding.where}"] if finding.where else []
    lines += ["", f"Case: {counterexample.case.name}"]
    lines += [f"  {name} = {written(array)}" for name, array in counterexample.case.arrays.items()]
    lines += [f"  {name} = {value}" for name, value in counterexample.case.parameters.items()]
    difference = counterexample.difference
    lines.append(f"Difference: {difference.text}")
    lines += [f"  there expected {difference.expected}", f"  there got {difference.got}"]
    for title, arrays in (("expected", counterexample.expected), ("got", counterexample.got)):
        lines += (
            [f"  {title} {difference.what}: {written(arrays[difference.what])}"] if difference.what in arrays else []
        )
    lines += [f"  at {line}" for line in counterexample.lines]
    if (
        all(array.size <= MOST_WRITTEN for array in counterexample.case.arrays.values())
        and not counterexample.case.is_refused
    ):
        steps = decisions(counterexample.case)
        lines += ["How the reference decides:", *steps] if steps else []
    return lines


def written(array: np.ndarray) -> str:
    """A small array in full with its dtype, a large one as its shape."""
    kind = f"{array.dtype.name} {array.shape}"
    return f"{array.tolist()} ({kind})" if array.size <= MOST_WRITTEN else kind
