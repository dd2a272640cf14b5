"""How a command says that it cannot do what was asked: one line on standard error, exit code 2."""

from pathlib import Path
from typing import NoReturn

import typer

__all__ = ["check_places", "fail"]


def fail(command: str, message: str) -> NoReturn:
    typer.echo(f"kvcluster {command}: {message}", err=True)
    raise typer.Exit(2)


def check_places(command: str, json: Path | None, figures: Path | None) -> None:
    """Fail unless results can be written to these places."""
    if json is not None and not json.absolute().parent.is_dir():
        fail(command, f"{json} must be a file in an existing folder")
    if figures is not None and not figures.is_dir():
        fail(command, f"{figures} must be a folder that exists")
