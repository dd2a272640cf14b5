"""Counterexamples as short scripts, each of which repeats its case."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from .case import Case
from .comparing import compare
from .implementation import Subject
from .report import Report

__all__ = ["repeat", "save"]

MOST_WRITTEN = 64  # numbers of an array that stands in the script; others lie in a file beside it
SCRIPT = '''"""{operation}, {name}: repeats a case of `kvcluster check`; ends with 1 as long as it differs."""
import sys
from pathlib import Path
import numpy as np
{imports}from kvcluster.conformance import Case, load_implementation
from kvcluster.conformance.saving import repeat

arrays = {{{arrays}}}
case = Case({operation!r}, {name!r}, arrays, {parameters}, is_refused={is_refused})
sys.exit(repeat(load_implementation({target!r}), case))
'''


def save(folder: Path, report: Report) -> list[Path]:
    """A script for each operation that differs or gives no answer, in a folder that is made; their paths."""
    target = report.implementation
    target = str(Path(target).resolve()) if target.endswith(".py") else target
    paths = []
    folder.mkdir(parents=True, exist_ok=True)
    for result in report.operations:
        found = result.counterexample
        case = result.ended_case if found is None else found.case
        if case is not None:
            path = folder / f"{result.operation}.py"
            path.write_text(script_of(case, target, path), "utf-8")
            paths.append(path)
    return paths


def script_of(case: Case, target: str, path: Path) -> str:
    """The script; large arrays are written beside it."""
    large = {name: array for name, array in case.arrays.items() if array.size > MOST_WRITTEN}
    if large:
        kept = {name: array.astype(np.float32) if array.dtype.kind == "V" else array for name, array in large.items()}
        np.savez_compressed(path.with_suffix(".npz"), **kept)  # type: ignore[arg-type]
    texts = []
    for name, array in case.arrays.items():
        if name in large:
            text = f"np.load(Path(__file__).with_suffix('.npz'))[{name!r}]"
        elif array.dtype.kind in "fV":
            numbers = array.astype(np.float64)
            text = f"np.array({numbers.tolist()}).reshape({array.shape})"
        else:
            text = f"np.array({array.tolist()}, np.int64).reshape({array.shape})"
        texts.append(f"{name!r}: {text}.astype({array.dtype.name!r})")
    classes = {type(value) for value in case.parameters.values() if dataclasses.is_dataclass(value)}
    imports = [f"from {each.__module__} import {each.__name__}\n" for each in classes]
    floats = [array for array in case.arrays.values() if array.dtype.kind in "fV"]
    floats += [np.array(value) for value in case.parameters.values() if isinstance(value, float)]
    if not all(np.isfinite(array).all() for array in floats):
        imports.append("from numpy import inf, nan\n")
    return SCRIPT.format(
        operation=case.operation,
        name=case.name,
        imports="".join(sorted(imports)),
        arrays=", ".join(texts),
        parameters=case.parameters,
        is_refused=case.is_refused,
        target=target,
    )


def repeat(implementation: Subject, case: Case) -> int:
    """Put one case to an implementation, say what comes of it, and return 0 if it is right, 1 if not, 2 if not told."""
    outcome = implementation.answer(case)
    for kind, reason in (("not put to it", outcome.skipped), ("no answer", outcome.ended)):
        if reason is not None:
            print(f"{case.operation} {case.name}: {kind}: {reason}")
            return 2
    difference = compare(case, outcome)
    if difference is None:
        print(f"{case.operation} {case.name}: right")
        return 0
    print(f"{case.operation} {case.name}: {difference.text}: expected {difference.expected}, got {difference.got}")
    lines: Any = () if outcome.error is None else outcome.error.lines
    for line in lines:
        print(f"  at {line}")
    return 1
