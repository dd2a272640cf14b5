"""What `kvcluster check` and `kvcluster vectors` do, once their options are read."""

import json
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from .case import Case
from .cases import all_cases
from .child import in_words
from .guard import DisturbedError
from .implementation import Subject, load_implementation
from .isolated import Isolated, UnloadableError
from .operations import OPERATIONS
from .report import Report
from .reporting import show
from .saving import save
from .scaffold import scaffold
from .suite import UnknownNameError, check
from .writing import as_json, as_junit, nothing_as_json, nothing_as_junit

__all__ = ["CannotRun", "check_and_show", "write_or_verify", "write_scaffold"]


class CannotRun(Exception):
    """Nothing can be said about the implementation; the message says why."""


def check_and_show(
    target: str,
    *,
    only: tuple[str, ...],
    seed: int,
    max_seconds: float,
    json_file: Path | None,
    junit_file: Path | None,
    require: tuple[str, ...] = (),
    save_folder: Path | None = None,
    is_isolated: bool = True,
    case_seconds: float = math.inf,
) -> bool:
    """Whether an implementation agrees, in the operations `only` or, if that is empty, in all; shows and writes why.

    Raises
    ------
    CannotRun : it cannot be loaded, has nothing to be checked, has not answered every case, or changed its process; a
        file cannot be written; an unknown operation or required name.
    """
    console = Console(width=None if sys.stdout.isatty() else 120)
    try:
        with loaded(target, is_isolated=is_isolated, case_seconds=case_seconds) as implementation:
            report = checked(console, implementation, only, seed, max_seconds, require)
    except CannotRun as error:
        write_reports(nothing_as_json(target, str(error)), nothing_as_junit(target, str(error)), json_file, junit_file)
        raise
    show(console, report)
    write_reports(as_json(report), as_junit(report), json_file, junit_file)
    if save_folder is not None:
        save_and_say(console, save_folder, report)
    if not report.differs and (reason := not_told(report, only)) is not None:
        raise CannotRun(reason)
    return report.agrees


def checked(
    console: Console,
    implementation: Subject,
    only: tuple[str, ...],
    seed: int,
    max_seconds: float,
    require: tuple[str, ...],
) -> Report:
    """The report on an implementation, made with a bar that shows how far it is."""
    names = only or tuple(OPERATIONS)
    if unknown := sorted(set(names) - set(OPERATIONS)):
        raise CannotRun(f"--only must be of {', '.join(OPERATIONS)}, got {', '.join(unknown)}")
    if absent := sorted(set(only) - set(implementation.operations)):
        raise CannotRun(f"--only names what {implementation.name} does not have: {', '.join(absent)}")
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("Check", total=sum(1 for _ in all_cases(names, seed)))
        try:
            return check(
                implementation,
                only=names,
                seed=seed,
                max_seconds=max_seconds,
                require=require,
                on_case=lambda: progress.advance(task),
            )
        except (DisturbedError, UnloadableError, UnknownNameError) as error:
            raise CannotRun(str(error)) from error


def write_reports(as_object: dict[str, Any], as_text: str, json_file: Path | None, junit_file: Path | None) -> None:
    if json_file is not None:
        write(json_file, json.dumps(as_object, indent=1, allow_nan=False) + "\n")
    if junit_file is not None:
        write(junit_file, as_text)


def not_told(report: Report, only: tuple[str, ...]) -> str | None:
    """Why nothing can be said of all that was asked; None if it can."""
    ended = [f"{result.operation} {text}" for result in report.operations for text in result.ended]
    if ended:
        return f"{len(ended)} cases gave no answer: {ended[0]}"
    if report.is_stopped:
        n_cases = sum(result.n_cases for result in report.operations)
        return f"--max-seconds came before the end: only {n_cases} cases were run"
    if not any(result.n_cases for result in report.operations):
        return f"nothing of {report.implementation} could be checked"
    unchecked = [result.operation for result in report.operations if result.operation in only and not result.n_cases]
    return f"nothing of {', '.join(unchecked)} could be checked" if unchecked else None


def save_and_say(console: Console, folder: Path, report: Report) -> None:
    try:
        paths = save(folder, report)
    except OSError as error:
        raise CannotRun(f"{folder} cannot be written: {error.strerror}") from error
    for path in paths:
        console.print(escape(f"python {path} repeats the case"), soft_wrap=True)


def write_scaffold(target: str) -> None:
    """A new adapter to be filled in.

    Raises
    ------
    CannotRun : `target` is not a new .py file, or cannot be written.
    """
    path = Path(target)
    if path.suffix != ".py" or path.exists():
        raise CannotRun(f"TARGET must be a new .py file for --scaffold, got {target!r}")
    write(path, scaffold(target))
    Console(width=None if sys.stdout.isatty() else 120).print(
        escape(f"{target} written: fill it in, then run kvcluster check {target}")
    )


def write_or_verify(folder: Path, *, seed: int, is_verified: bool) -> bool:
    """Write vectors to a folder, or compare those in it with the reference; whether all are right.

    Raises
    ------
    OSError, ValueError : as `write_vectors` and `verify_vectors`.
    """
    from .vectors import verify_vectors, write_vectors  # needs safetensors, which checking does not

    differences: list[str] = []
    numbers: dict[str, int] = {}  # of cases, by operation
    console = Console()
    with Progress(console=console) as progress:
        total = sum(not case.is_refused for case in all_cases(seed=seed))
        task = progress.add_task("Verify" if is_verified else "Write", total=total)

        def count(case: Case) -> None:
            numbers[case.operation] = numbers.get(case.operation, 0) + 1
            progress.advance(task)

        if is_verified:
            differences = verify_vectors(folder, count)
        else:
            write_vectors(folder, seed, count)
    console.print(table_of(folder, numbers))
    for difference in differences:
        print(difference)
    if is_verified:
        print(f"{len(differences):,} differences" if differences else f"{folder} is what the reference says")
    return not differences


def table_of(folder: Path, numbers: dict[str, int]) -> Table:
    """Cases and bytes of every operation."""
    paths = [folder / f"{operation}.safetensors" for operation in numbers]
    sizes = [path.stat().st_size if path.is_file() else 0 for path in paths]
    table = Table(title=escape(f"Test vectors in {folder}"), show_footer=True)
    table.add_column("operation", footer="all")
    table.add_column("cases", justify="right", footer=f"{sum(numbers.values()):,}")
    table.add_column("bytes", justify="right", footer=f"{sum(sizes):,}")
    for (operation, number), size in zip(numbers.items(), sizes, strict=True):
        table.add_row(operation, f"{number:,}", f"{size:,}")
    return table


@contextmanager
def loaded(target: str, *, is_isolated: bool, case_seconds: float) -> Iterator[Subject]:
    """The implementation, in a process of its own where there can be one, for as long as it is needed."""
    if not is_isolated or os.name != "posix":
        try:
            implementation = load_implementation(target)
        except DisturbedError as error:
            raise CannotRun(str(error)) from error
        except (Exception, SystemExit) as error:  # whatever a module raises when it is imported
            raise CannotRun(f"{target} cannot be loaded: {in_words(error)}") from error
        yield implementation
        return
    try:
        isolated = Isolated(target, case_seconds)
    except DisturbedError as error:
        raise CannotRun(str(error)) from error
    except UnloadableError as error:
        raise CannotRun(f"{target} cannot be loaded: {error}") from error
    with isolated:
        yield isolated


def write(path: Path, text: str) -> None:
    """A file that cannot be written must not look like an implementation that differs."""
    try:
        path.write_text(text, "utf-8", "backslashreplace")  # names of files need not be characters
    except OSError as error:
        raise CannotRun(f"{path} cannot be written: {error.strerror}") from error
