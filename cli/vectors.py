"""`kvcluster vectors`: the reference's cases and results as files, for implementations in any language."""

from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["vectors"]


def vectors(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new or empty folder, or one of vectors.")],
    seed: Annotated[int, typer.Option(min=0, max=2**32, help="Another seed puts other numbers into the cases.")] = 0,
    verify: Annotated[
        bool, typer.Option("--verify", help="Write nothing; check the vectors in DIR against the reference.")
    ] = False,
) -> None:
    """Write test vectors: inputs and expected results of every operation, the same bytes on every machine."""
    from rich.console import Console
    from rich.progress import Progress

    try:
        from kvcluster.conformance.cases import all_cases
        from kvcluster.conformance.vectors import verify_vectors, write_vectors
    except ModuleNotFoundError as error:
        raise missing(error) from error

    differences: list[str] = []
    numbers: dict[str, int] = {}  # of cases, by operation
    console = Console()
    with Progress(console=console) as progress:
        total = sum(not case.is_refused for case in all_cases(seed=seed))
        task = progress.add_task("Verify" if verify else "Write", total=total)

        def count(case: Any) -> None:
            numbers[case.operation] = numbers.get(case.operation, 0) + 1
            progress.advance(task)

        try:
            if verify:
                differences = verify_vectors(folder, count)
            else:
                write_vectors(folder, seed, count)
        except ModuleNotFoundError as error:
            raise missing(error) from error
        except (OSError, ValueError) as error:
            raise fail(str(error)) from error
    console.print(table_of(folder, numbers))
    for difference in differences:
        typer.echo(difference)
    if verify:
        typer.echo(f"{len(differences):,} differences" if differences else f"{folder} is what the reference says")
    raise typer.Exit(1 if differences else 0)


def table_of(folder: Path, numbers: dict[str, int]) -> Any:
    """Cases and bytes of every operation."""
    from rich.table import Table

    paths = [folder / f"{operation}.safetensors" for operation in numbers]
    sizes = [path.stat().st_size if path.is_file() else 0 for path in paths]
    table = Table(title=f"Test vectors in {folder}", show_footer=True)
    table.add_column("operation", footer="all")
    table.add_column("cases", justify="right", footer=f"{sum(numbers.values()):,}")
    table.add_column("bytes", justify="right", footer=f"{sum(sizes):,}")
    for (operation, number), size in zip(numbers.items(), sizes, strict=True):
        table.add_row(operation, f"{number:,}", f"{size:,}")
    return table


def missing(error: ModuleNotFoundError) -> typer.Exit:
    """The message that a package is not installed, and how it is."""
    return fail(f"{error.name} is not installed: pip install 'kvcluster[oracle]'")


def fail(message: str) -> typer.Exit:
    """One line on standard error, exit code 2."""
    typer.echo(f"kvcluster vectors: {message}", err=True)
    return typer.Exit(2)
