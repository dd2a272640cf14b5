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
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the report to this file.")] = None,
    junit: Annotated[Path | None, typer.Option(help="Write a JUnit report to this file.")] = None,
) -> None:
    """Hold an implementation against the reference: exit status 0 agrees, 1 differs, 2 cannot run.

    Decisions, caches and centroids must be equal bit for bit, attention outputs within the bound of the reference.
    """
    try:
        from kvcluster.conformance.commands import CannotRun, check_and_show, write_scaffold
    except ModuleNotFoundError as error:
        fail("check", f"{error.name} is not installed: pip install 'kvcluster[oracle]'")
    check_places(json_file, None)
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
        )
    except CannotRun as error:
        fail("check", str(error))
    raise typer.Exit(0 if agrees else 1)
