"""`kvcluster demo`: a real model on a clustered cache, beside its full cache and checked by the reference."""

from pathlib import Path
from typing import Annotated

import typer

from .refusing import fail

__all__ = ["demo"]


def demo(
    model: Annotated[
        str, typer.Option(help="smollm2, gemma3-270m, or the folder of a local model in transformers' format.")
    ] = "smollm2",
    text: Annotated[
        Path | None, typer.Option(help="Text file, UTF-8. [default: the Python language reference, from pydoc]")
    ] = None,
    keep_ratio: Annotated[float, typer.Option(help="Entries kept / tokens in the clustered body, in (0, 1].")] = 0.25,
    chunk_size: Annotated[int, typer.Option(help="Tokens that are clustered together.")] = 256,
    tokens: Annotated[int, typer.Option(help="Tokens of context.")] = 4096,
    figure: Annotated[Path, typer.Option(help="Where the figure is saved.")] = Path("kvcluster-demo.png"),
) -> None:
    """Generate from a clustered cache beside the full one, and let the NumPy reference check every decision."""
    try:
        from kvcluster.evaluation.demo.run import run_demo
    except ModuleNotFoundError as error:
        fail("demo", f"{error.name} is not installed; the demo needs: pip install 'kvcluster[hf]'")

    agrees = run_demo(model, text, keep_ratio=keep_ratio, chunk_size=chunk_size, n_context=tokens, figure_path=figure)
    raise typer.Exit(0 if agrees else 1)
