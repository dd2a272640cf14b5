"""`kvcluster vectors`: the reference's cases and results as files, for implementations in any language."""

from pathlib import Path
from typing import Annotated

import typer

from .refusing import fail

__all__ = ["vectors"]


def vectors(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new or empty folder, or one of vectors.")],
    seed: Annotated[int, typer.Option(min=0, max=2**32, help="Another seed puts other numbers into the cases.")] = 0,
    verify: Annotated[
        bool, typer.Option("--verify", help="Write nothing; check the vectors in DIR against the reference.")
    ] = False,
) -> None:
    """Write test vectors: inputs and expected results of every operation, the same bytes on every machine."""
    try:
        from kvcluster.conformance.commands import write_or_verify

        is_right = write_or_verify(folder, seed=seed, is_verified=verify)
    except ModuleNotFoundError as error:
        fail("vectors", f"{error.name} is not installed: pip install 'kvcluster[oracle]'")
    except ValueError as error:
        fail("vectors", str(error))
    raise typer.Exit(0 if is_right else 1)
