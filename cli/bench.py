"""`kvcluster bench`: clustered attention and decoding on this CPU, beside full caches and the limit of their bytes."""

from pathlib import Path
from typing import Annotated

import typer

from .refusing import check_places, fail

__all__ = ["bench"]


def bench(
    quick: Annotated[bool, typer.Option("--quick", help="Small problems, in a minute; no claim is decided.")] = False,
    json: Annotated[Path | None, typer.Option(help="Also write all numbers here.")] = None,
    figures: Annotated[Path | None, typer.Option(help="Folder to save the figures in.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Exit with 1 if a target is missed.")] = False,
    only: Annotated[str, typer.Option(help="Sections to run, such as 1,4.")] = "1,2,3,4,5",
) -> None:
    """Time attention, decoding and serving on this CPU: full against clustered against what the bytes allow.

    Takes about fifteen minutes and 16 GB of memory. Run it alone.
    """
    try:
        from kvcluster.evaluation.speed.run import run_bench
    except ModuleNotFoundError as error:
        fail("bench", f"{error.name} is not installed: pip install 'kvcluster[hf]'")

    check_places(json, figures)
    chosen = {part.strip() for part in only.split(",")}
    if not chosen <= set("12345"):
        fail("bench", f"only must be numbers from 1 to 5, got {only}")
    is_met = run_bench(quick=quick, json_path=json, figures=figures, sections=chosen)
    raise typer.Exit(1 if check and not is_met else 0)
