"""What `kvcluster check` and `kvcluster vectors` do, once their options are read."""

import json
import sys
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from .case import Case
from .cases import all_cases
from .implementation import Implementation, load_implementation
from .operations import OPERATIONS
from .reporting import as_json, as_junit, show
from .scaffold import scaffold
from .suite import check

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
) -> bool:
    """Whether an implementation agrees, in the operations `only` or, if that is empty, in all; shows and writes why.

    Raises
    ------
    CannotRun : it cannot be loaded, has nothing to be checked, or a file cannot be written; an unknown operation.
    """
    console = Console(width=None if sys.stdout.isatty() else 120)
    implementation = loaded(target)
    names = only or tuple(OPERATIONS)
    if unknown := sorted(set(names) - set(OPERATIONS)):
        raise CannotRun(f"--only must be of {', '.join(OPERATIONS)}, got {', '.join(unknown)}")
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("Check", total=sum(1 for _ in all_cases(names, seed)))
        report = check(
            implementation, only=names, seed=seed, max_seconds=max_seconds, on_case=lambda: progress.advance(task)
        )
    show(console, report)
    if json_file is not None:
        write(json_file, json.dumps(as_json(report), indent=1, allow_nan=False) + "\n")
    if junit_file is not None:
        write(junit_file, as_junit(report))
    if not any(result.n_cases for result in report.operations):
        raise CannotRun(f"nothing of {target} could be checked")
    return report.agrees


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


def loaded(target: str) -> Implementation:
    try:
        return load_implementation(target)
    except (Exception, SystemExit) as error:  # whatever a module raises when it is imported
        raise CannotRun(f"{target} cannot be loaded: {type(error).__name__}: {error}") from error


def write(path: Path, text: str) -> None:
    """A file that cannot be written must not look like an implementation that differs."""
    try:
        path.write_text(text, "utf-8", "backslashreplace")  # names of files need not be characters
    except OSError as error:
        raise CannotRun(f"{path} cannot be written: {error.strerror}") from error
