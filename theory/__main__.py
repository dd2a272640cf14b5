"""`python -m kvcluster.theory`: every claim, its check, the verdict; and the figures."""

import importlib.util
import inspect
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from kvcluster.evaluation.commands import Command, fail, run
from kvcluster.evaluation.places import check_folder

from .catalogue import CLAIMS
from .claims import Check, Claim, NotInstalledError
from .real_cache import MODEL

__all__ = ["app", "main"]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command("theory", cls=Command)
def main(
    claim: Annotated[str | None, typer.Option(help="Check this claim only, such as M5.", metavar="N")] = None,
    figures: Annotated[Path | None, typer.Option(help="Draw the figures into this folder.", metavar="DIR")] = None,
    model: Annotated[
        str, typer.Option(help="Measure this one where keys of a real model are: smollm2, gemma3-270m or a folder.")
    ] = MODEL,
) -> None:
    """Try to break every numbered claim of the pages in theory/, and say how near it came.

    Ends with 0 if all hold, 1 if one is broken, 2 if one could not be checked because something is not installed.
    """
    chosen = chosen_claims(claim)
    if figures is not None:
        check_folder(figures)
        if importlib.util.find_spec("matplotlib") is None:
            fail("theory", "matplotlib is not installed: pip install 'kvcluster[hf]'")
    if figures is not None and model != MODEL:
        fail("theory", f"model must be {MODEL} with figures, which show no other, got {model}")
    console = Console(width=None if sys.stdout.isatty() else 120)
    verdicts_of = {}
    errors = Console(stderr=True)
    for attacked in track(chosen, "Check", console=errors, transient=True, disable=not errors.is_terminal):
        verdicts_of[attacked] = attempt(attacked, model)
    console.print(table_of(verdicts_of))
    if figures is not None:
        from .figures import draw_all

        try:
            for path in draw_all(figures):
                console.print(f"Drawn: {escape(str(path))}", highlight=False)
        except NotInstalledError as error:
            fail("theory", str(error))
    verdicts = [verdict for checks in verdicts_of.values() for verdict in checks]
    n_broken = sum(isinstance(verdict, Check) and not verdict.holds for verdict in verdicts)
    n_missing = sum(isinstance(verdict, str) for verdict in verdicts)
    console.print(
        f"{len(chosen)} claims, {len(verdicts) - n_missing} checks ran: {n_broken} broken, {n_missing} not run. "
        "A check looks for a case where `worst` is above `bound`.",
        highlight=False,
    )
    raise typer.Exit(1 if n_broken else 2 if n_missing else 0)


def chosen_claims(number: str | None) -> list[Claim]:
    """All claims, or the one of that number.

    Raises
    ------
    typer.Exit : no such claim.
    """
    if number is None:
        return list(CLAIMS)
    chosen = [claim for claim in CLAIMS if claim.number == number.upper()]
    if not chosen:
        fail("theory", f"claim must be one of {' '.join(claim.number for claim in CLAIMS)}, got {number}")
    return chosen


def attempt(claim: Claim, model: str = MODEL) -> list[Check | str]:
    """What each check of a claim found, of `model` where it reads a real one, or what it lacked."""
    verdicts: list[Check | str] = []
    for name in claim.checks:
        try:
            check = claim.find_check(name)
            reads_a_model = "model" in inspect.signature(check).parameters
            verdicts.append(check(model=model) if reads_a_model else check())
        except ModuleNotFoundError as error:
            verdicts.append(f"{error.name} is not installed")
        except NotInstalledError as error:
            verdicts.append(str(error))
    return verdicts


def table_of(verdicts_of: dict[Claim, list[Check | str]]) -> Table:
    """A row for each claim, one for each of its checks, and what these noted."""
    table = Table(title="The claims of theory/*/README.md, and the attempts to break them", box=box.SIMPLE_HEAD)
    table.add_column("claim", style="bold")
    table.add_column("what it says, what was measured, what was found")
    for name in ("cases", "worst", "bound"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("holds")
    for claim, checks in verdicts_of.items():
        table.add_row(claim.number, f"[bold]{escape(claim.statement)}[/]")
        for verdict in checks:
            if isinstance(verdict, str):
                table.add_row("", f"not run: {escape(verdict)}", "", "", "", "[bold yellow]?[/]")
                continue
            numbers = f"{verdict.cases:,}", f"{verdict.worst:.4g}", f"{verdict.bound:.4g}"
            table.add_row("", escape(verdict.measured), *numbers, "yes" if verdict.holds else "[bold red]NO[/]")
            if verdict.note:
                table.add_row("", f"[dim]{escape(verdict.note)}[/]")
    return table


if __name__ == "__main__":
    run(app)
