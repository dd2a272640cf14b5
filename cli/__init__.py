"""The `kvcluster` command. Subcommands import what they need when they run: `--help` needs no torch."""

from importlib.metadata import version

import typer

from .bench import bench
from .check import check
from .demo import demo
from .eval import evaluate
from .kernels import kernels
from .serving import serve_demo
from .tune import tune
from .vectors import vectors

__all__ = ["app", "main"]

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.command()(bench)
app.command()(check)
app.command()(demo)
app.command("eval")(evaluate)
app.command()(kernels)
app.command()(serve_demo)
app.command()(tune)
app.command()(vectors)


@app.callback(invoke_without_command=True)
def about(show_version: bool = typer.Option(False, "--version", help="Print the version and stop.")) -> None:
    """Cluster the key-value cache of long-context language models."""
    if show_version:
        typer.echo(f"kvcluster {version('kvcluster')}")
        raise typer.Exit


def main() -> None:
    """Entry point of the installed command."""
    app()
