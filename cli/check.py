"""`kvcluster check`: anybody's implementation against the reference."""

from pathlib import Path
from typing import Annotated

import typer

from .refusing import check_places, fail

__all__ = ["check"]


def check(
    target: Annotated[
        str, typer.Argument(help="package.module, or a path to a .py file, with some of the public names.")
    ],
    only: Annotated[list[str] | None, typer.Option(help="This operation only; may be given several times.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Puts other numbers into the same cases.")] = 0,
    max_seconds: Annotated[float, typer.Option(min=0, help="Begin no other case after this long.")] = float("inf"),
    scaffold: Annotated[
        bool, typer.Option("--scaffold", help="Write an adapter to fill in to TARGET, and stop.")
    ] = False,
    require: Annotated[
        list[str] | None,
        typer.Option(help="This operation or result must be there to be compared; may be given several times."),
    ] = None,
    isolate: Annotated[
        bool, typer.Option(help="Run TARGET in a process of its own, and in a new one when that dies.")
    ] = True,
    case_seconds: Annotated[
        float, typer.Option(min=0, help="A case that takes longer is stopped, with --isolate.")
    ] = 300.0,
    save: Annotated[
        Path | None, typer.Option(help="Write a script that repeats the case to this folder, for each operation.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the report to this file.")] = None,
    junit: Annotated[Path | None, typer.Option(help="Write a JUnit report to this file.")] = None,
) -> None:
    """Hold an implementation against the reference: exit status 0 agrees, 1 differs, 2 cannot be told.

    Decisions, caches and centroids must be equal bit for bit, attention outputs within the bound of the reference. What
    TARGET does not show is not compared: the table lists it.
    """
    try:
        from kvcluster.conformance.commands import CannotRun, check_and_show, write_scaffold
    except ModuleNotFoundError as error:
        fail("check", f"{error.name} is not installed: pip install 'kvcluster[oracle]'")
    if save is not None:
        save.mkdir(parents=True, exist_ok=True)
    check_places(json_file, save)
    check_places(junit, None)
    try:
        if scaffold:
            write_scaffold(target)
            return
        agrees = check_and_show(
            target,
            only=tuple(only or ()),
            seed=seed,
            max_seconds=max_seconds,
            json_file=json_file,
            junit_file=junit,
            require=tuple(require or ()),
            save_folder=save,
            is_isolated=isolate,
            case_seconds=case_seconds,
        )
    except CannotRun as error:
        fail("check", str(error))
    raise typer.Exit(0 if agrees else 1)
