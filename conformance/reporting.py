"""A report for people, as a table and a panel for each operation that differs, and for programs, as JSON and JUnit."""

from typing import Any
from xml.etree import ElementTree

import numpy as np
from rich.console import Console
from rich.markup import escape
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
    table = Table(title=escape(f"{report.implementation} against the reference ({report.seconds:.1f} s)"))
    for column in ("operation", "cases", "differ", "not put to it", "verdict"):
        table.add_column(column, justify="right" if column in ("cases", "differ") else "left")
    for result in report.operations:
        skipped = ", ".join(f"{number}: {reason}" for reason, number in result.skipped.items())
        colour = COLOURS[result.verdict]
        verdict = f"[{colour}]{result.verdict}[/{colour}]"
        table.add_row(result.operation, str(result.n_cases), str(result.n_failed), skipped, verdict)
    console.print(table)
    for result in report.operations:
        if result.counterexample is not None:
            text = Text("\n".join(lines_on(result.counterexample)))
            console.print(Panel(text, title=f"{result.operation} differs", title_align="left", border_style="red"))
    if report.is_stopped:
        console.print("Stopped by --max-seconds: not all cases were checked.")


def lines_on(counterexample: Counterexample) -> list[str]:
    """What is wrong, the case, what must come out, what does, and how the reference decides."""
    lines = [f"What is wrong: {counterexample.cause or 'no known mistake explains it'}"]
    lines += [f"Rule: {counterexample.rule} of SPECIFICATION.md", "", f"Case: {counterexample.case.name}"]
    lines += [f"  {name} = {written(array)}" for name, array in counterexample.case.arrays.items()]
    lines += [f"  {name} = {value}" for name, value in counterexample.case.parameters.items()]
    what = counterexample.difference.what
    lines.append(f"Difference: {counterexample.difference.text}")
    for title, arrays, text in (
        ("expected", counterexample.expected, counterexample.difference.expected),
        ("got", counterexample.got, counterexample.difference.got),
    ):
        lines.append(f"  {title} {what}: {written(arrays[what]) if what in arrays else text}")
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


def as_json(report: Report) -> dict[str, Any]:
    """The whole report, in types that JSON has."""
    operations = [
        {
            "operation": result.operation,
            "verdict": result.verdict,
            "cases": result.n_cases,
            "differ": result.n_failed,
            "skipped": dict(result.skipped),
            "failed": result.failed,
            "counterexample": None if result.counterexample is None else counterexample_as_json(result.counterexample),
        }
        for result in report.operations
    ]
    return {
        "implementation": report.implementation,
        "agrees": report.agrees,
        "seconds": report.seconds,
        "is_stopped": report.is_stopped,
        "operations": operations,
    }


def counterexample_as_json(counterexample: Counterexample) -> dict[str, Any]:
    arrays = {
        name: {key: listed(array) for key, array in group.items()}
        for name, group in (
            ("inputs", counterexample.case.arrays),
            ("expected", counterexample.expected),
            ("got", counterexample.got),
        )
    }
    return {
        **arrays,
        "parameters": counterexample.case.written_parameters,
        "cause": counterexample.cause,
        "rule": counterexample.rule,
        "difference": counterexample.difference._asdict(),
        "case": counterexample.case.name,
    }


def listed(array: np.ndarray) -> Any:
    """An array as JSON has it, as strings if any number is not finite."""
    return array.tolist() if np.isfinite(array).all() else array.astype(str).tolist()


def as_junit(report: Report) -> str:
    """One test case per operation."""
    failures = sum(result.verdict == "differs" for result in report.operations)
    skipped = sum(result.verdict == "not checked" for result in report.operations)
    attributes = {"name": f"kvcluster check {report.implementation}", "tests": str(len(report.operations))}
    attributes |= {"failures": str(failures), "skipped": str(skipped), "time": f"{report.seconds:.3f}"}
    root = ElementTree.Element("testsuite", attributes)
    for result in report.operations:
        case = ElementTree.SubElement(root, "testcase", {"classname": report.implementation, "name": result.operation})
        if result.verdict == "not checked":
            ElementTree.SubElement(case, "skipped", {"message": ", ".join(result.skipped)})
        if result.counterexample is not None:
            message = result.counterexample.cause or result.counterexample.difference.text
            failure = ElementTree.SubElement(
                case, "failure", {"message": f"{message} (rule {result.counterexample.rule})"}
            )
            failure.text = "\n".join(result.failed)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"
