"""A report for people, as a table and a panel for each operation that differs, and for programs, as JSON and JUnit."""

from typing import Any
from xml.etree import ElementTree

import numpy as np
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from .explaining import decisions
from .suite import Counterexample, Report

__all__ = ["as_json", "as_junit", "show"]

MOST_WRITTEN = 64  # numbers of an array that is written in full
COLOURS = {"agrees": "green", "differs": "red", "not checked": "dim"}


def show(console: Console, report: Report) -> None:
    """A table, then a panel for each operation that differs."""
    table = Table(title=f"{report.implementation} against the reference ({report.seconds:.1f} s)")
    for column in ("operation", "cases", "differ", "not put to it", "verdict"):
        table.add_column(column, justify="right" if column in ("cases", "differ") else "left")
    for each in report.operations:
        skipped = ", ".join(f"{number}: {reason}" for reason, number in each.skipped.items())
        colour = COLOURS[each.verdict]
        verdict = f"[{colour}]{each.verdict}[/{colour}]"
        table.add_row(each.operation, str(each.n_cases), str(each.n_failed), skipped, verdict)
    console.print(table)
    for each in report.operations:
        if each.counterexample is not None:
            text = Text("\n".join(lines_on(each.counterexample)))
            console.print(Panel(text, title=f"{each.operation} differs", title_align="left", border_style="red"))
    if report.is_stopped:
        console.print("Stopped by --max-seconds: not all cases were checked.")


def lines_on(found: Counterexample) -> list[str]:
    """What is wrong, the case, what must come out, what does, and how the reference decides."""
    lines = [f"What is wrong: {found.cause or 'no known mistake explains it'}"]
    lines += [f"Rule: {found.rule} of SPECIFICATION.md", "", f"Case: {found.case.name}"]
    lines += [f"  {name} = {written(array)}" for name, array in found.case.arrays.items()]
    lines += [f"  {name} = {value}" for name, value in found.case.parameters.items()]
    what = found.difference.what
    lines.append(f"Difference: {found.difference.text}")
    for title, arrays, one in (
        ("expected", found.expected, found.difference.expected),
        ("got", found.got, found.difference.got),
    ):
        lines.append(f"  {title} {what}: {written(arrays[what]) if what in arrays else one}")
    if all(array.size <= MOST_WRITTEN for array in found.case.arrays.values()) and not found.case.is_refused:
        steps = decisions(found.case)
        lines += ["How the reference decides:", *steps] if steps else []
    return lines


def written(array: np.ndarray) -> str:
    """A small array in full with its dtype, a large one as its shape."""
    kind = f"{array.dtype.name} {array.shape}"
    return f"{array.tolist()} ({kind})" if array.size <= MOST_WRITTEN else kind


def as_json(report: Report) -> dict[str, Any]:
    """The whole report, of what JSON knows only."""
    operations = [
        {
            "operation": each.operation,
            "verdict": each.verdict,
            "cases": each.n_cases,
            "differ": each.n_failed,
            "skipped": dict(each.skipped),
            "failed": each.failed,
            "counterexample": None if each.counterexample is None else counterexample_as_json(each.counterexample),
        }
        for each in report.operations
    ]
    return {
        "implementation": report.implementation,
        "agrees": report.agrees,
        "seconds": report.seconds,
        "is_stopped": report.is_stopped,
        "operations": operations,
    }


def counterexample_as_json(found: Counterexample) -> dict[str, Any]:
    arrays = {
        name: {key: listed(array) for key, array in group.items()}
        for name, group in (("inputs", found.case.arrays), ("expected", found.expected), ("got", found.got))
    }
    return {
        **arrays,
        "parameters": found.case.written_parameters,
        "cause": found.cause,
        "rule": found.rule,
        "difference": found.difference._asdict(),
        "case": found.case.name,
    }


def listed(array: np.ndarray) -> Any:
    """An array as JSON has it, in strings where some numbers are not finite."""
    return array.tolist() if np.isfinite(array).all() else array.astype(str).tolist()


def as_junit(report: Report) -> str:
    """One test case per operation."""
    failures = sum(each.verdict == "differs" for each in report.operations)
    skipped = sum(each.verdict == "not checked" for each in report.operations)
    attributes = {"name": f"kvcluster check {report.implementation}", "tests": str(len(report.operations))}
    attributes |= {"failures": str(failures), "skipped": str(skipped), "time": f"{report.seconds:.3f}"}
    root = ElementTree.Element("testsuite", attributes)
    for each in report.operations:
        case = ElementTree.SubElement(root, "testcase", {"classname": report.implementation, "name": each.operation})
        if each.verdict == "not checked":
            ElementTree.SubElement(case, "skipped", {"message": ", ".join(each.skipped)})
        if each.counterexample is not None:
            message = each.counterexample.cause or each.counterexample.difference.text
            failure = ElementTree.SubElement(
                case, "failure", {"message": f"{message} (rule {each.counterexample.rule})"}
            )
            failure.text = "\n".join(each.failed)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"
