"""The `kvcluster` command. Subcommands import what they need when they run: `--help` needs no torch."""

from importlib.metadata import version

import typer

from kvcluster.evaluation.commands import Command, run

from .bench import bench
from .check import check
from .demo import demo
from .eval import evaluate
from .kernels import kernels
from .serving import serve_demo
from .tune import tune
from .vectors import vectors

__all__ = ["app", "main"]

EPILOG = (
    "Ends with 0: done, what was checked agrees; 1: something differs, or a target is missed; 2: cannot be done, and "
    "one line says why; 130: interrupted; 141: whoever read the output has gone."
)
app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, epilog=EPILOG)
app.command(cls=Command)(bench)
app.command(cls=Command)(check)
app.command(cls=Command)(demo)
app.command("eval", cls=Command)(evaluate)
app.command(cls=Command)(kernels)
app.command(cls=Command)(serve_demo)
app.command(cls=Command)(tune)
app.command(cls=Command)(vectors)


@app.callback(invoke_without_command=True)
def about(show_version: bool = typer.Option(False, "--version", help="Print the version and stop.")) -> None:
    """Cluster the key-value cache of long-context language models."""
    if show_version:
        typer.echo(f"kvcluster {version('kvcluster')}")
        raise typer.Exit


def main() -> None:
    """Entry point of the installed command."""
    run(app)
