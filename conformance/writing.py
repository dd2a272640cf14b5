"""A report for programs, as JSON and as JUnit."""

from importlib.metadata import version
from typing import Any
from xml.etree import ElementTree

import numpy as np

from .report import Counterexample, OperationReport, Report

__all__ = ["CONTRACT", "as_json", "as_junit", "nothing_as_json", "nothing_as_junit"]

CONTRACT = 1  # of arithmetic, as in the manifest of vectors


def as_json(report: Report) -> dict[str, Any]:
    """The whole report, in types that JSON has."""
    return {
        "implementation": report.implementation,
        "version": version("kvcluster"),
        "arithmetic_contract": CONTRACT,
        "seed": report.seed,
        "dtypes": list(report.dtypes),
        "agrees": report.agrees,
        "differs": report.differs,
        "seconds": report.seconds,
        "is_stopped": report.is_stopped,
        "operations": [operation_as_json(result) for result in report.operations],
    }


def nothing_as_json(target: str, reason: str) -> dict[str, Any]:
    """The report of a run that could not be made, so that no earlier one is taken for its own."""
    told = {"version": version("kvcluster"), "arithmetic_contract": CONTRACT, "agrees": False, "differs": False}
    return {"implementation": target, **told, "error": reason, "operations": []}


def nothing_as_junit(target: str, reason: str) -> str:
    """The same as JUnit: one test case, in error."""
    numbers = {"tests": "1", "failures": "0", "errors": "1", "skipped": "0"}
    root = ElementTree.Element("testsuite", {"name": f"kvcluster check {target}", **numbers})
    case = ElementTree.SubElement(root, "testcase", {"classname": target, "name": "check"})
    ElementTree.SubElement(case, "error", {"message": reason})
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def operation_as_json(result: OperationReport) -> dict[str, Any]:
    found = result.counterexample
    return {
        "operation": result.operation,
        "verdict": result.verdict,
        "cases": result.n_cases,
        "differ": result.n_failed,
        "skipped": dict(result.skipped),
        "failed": result.failed,
        "ended": result.ended,
        "unsteady": result.unsteady,
        "compared": dict(result.compared),
        "not_shown": dict(result.not_shown),
        "missing": result.missing,
        "seconds": result.seconds,
        "counterexample": None if found is None else counterexample_as_json(found),
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
        "input_dtypes": {name: array.dtype.name for name, array in counterexample.case.arrays.items()},
        "parameters": {name: plain(value) for name, value in counterexample.case.written_parameters.items()},
        "cause": counterexample.cause,
        "rule": counterexample.rule,
        "findings": [finding._asdict() for finding in counterexample.findings],
        "difference": counterexample.difference._asdict(),
        "raised_at": list(counterexample.lines),
        "case": counterexample.case.name,
    }


def listed(array: np.ndarray) -> Any:
    """An array as JSON has it, as strings if any number is not finite."""
    return array.tolist() if np.isfinite(array).all() else array.astype(str).tolist()


def plain(value: Any) -> Any:
    """A parameter as JSON has it: NaN is none of its numbers."""
    return value if not isinstance(value, float) or np.isfinite(value) else str(value)


def as_junit(report: Report) -> str:
    """One test case per operation: a failure where it differs, an error where it cannot be told."""
    verdicts = [result.verdict for result in report.operations]
    numbers = {
        "tests": len(verdicts),
        "failures": verdicts.count("differs"),
        "errors": verdicts.count("cannot be told"),
        "skipped": verdicts.count("not checked"),
    }
    attributes = {"name": f"kvcluster check {report.implementation}", **{k: str(v) for k, v in numbers.items()}}
    root = ElementTree.Element("testsuite", {**attributes, "time": f"{report.seconds:.3f}"})
    properties = ElementTree.SubElement(root, "properties")
    told = {"version": version("kvcluster"), "arithmetic_contract": CONTRACT, "seed": report.seed}
    for name, value in {**told, "dtypes": ", ".join(report.dtypes)}.items():
        ElementTree.SubElement(properties, "property", {"name": name, "value": str(value)})
    for result in report.operations:
        case = ElementTree.SubElement(
            root,
            "testcase",
            {"classname": report.implementation, "name": result.operation, "time": f"{result.seconds:.3f}"},
        )
        add_verdict(case, result)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def add_verdict(case: ElementTree.Element, result: OperationReport) -> None:
    found = result.counterexample
    if result.verdict == "not checked":
        ElementTree.SubElement(case, "skipped", {"message": ", ".join(result.skipped)})
    elif result.verdict == "cannot be told":
        message = "; ".join((*result.ended, *result.skipped))
        ElementTree.SubElement(case, "error", {"message": message}).text = "\n".join(result.ended)
    elif result.verdict == "differs":
        message = f"required and not shown: {', '.join(result.missing)}"
        text = list(result.failed)
        if found is not None:
            message = f"{found.cause or found.difference.text} (rule {found.rule})"
            text += [f"{found.case.name}: expected {found.difference.expected}, got {found.difference.got}"]
            text += found.lines
        ElementTree.SubElement(case, "failure", {"message": message}).text = "\n".join(text)
    if result.not_shown:
        ElementTree.SubElement(case, "system-out").text = f"not compared: {', '.join(result.not_shown)}"
