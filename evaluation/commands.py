"""How a command ends: with a code that says what came of it, and of what went wrong outside of it one line.

| code | what it says |
|---|---|
| 0 | done: what was checked agrees |
| 1 | done: something differs, or a target is missed |
| 2 | cannot be done: an option, a file or a place is of no use, or something is not installed |
| 130 | interrupted, by Ctrl-C |
| 141 | whoever read the output has gone, such as `head` |

The last two are 128 and the number of a signal, as a shell has them. A fault of the program itself is none of these: it
shows its traceback, and Python ends with 1.
"""

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import typer
from typer.core import TyperCommand

from .errors import UnusableInputError, one_line

__all__ = ["Command", "fail", "run"]

CANNOT, INTERRUPTED, READER_GONE = 2, 130, 141


class Command(TyperCommand):
    """A command whose errors of the world outside are one line on standard error."""

    def invoke(self, ctx: Any) -> Any:
        with outside(self.name or ""):
            return super().invoke(ctx)


def run(app: typer.Typer) -> None:
    """Run a command and end the process, with its code."""
    open_streams()
    try:
        with outside(""):  # help and version, which are no command's
            app()
    except typer.Exit as end:
        sys.exit(end.exit_code)


def fail(command: str, message: str, code: int = CANNOT) -> NoReturn:
    """End the command with one line on standard error."""
    try:
        typer.echo(f"{f'kvcluster {command}'.strip()}: {one_line(ValueError(message))}", err=True)
    except OSError:
        discard(sys.stderr.fileno())
    raise typer.Exit(code)


@contextmanager
def outside(command: str) -> Iterator[None]:
    """End the command in one line where a file, the reader of the output, or whoever is at the keyboard ends it."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        fail(command, "interrupted", INTERRUPTED)
    except OutputLostError as error:
        fail(command, str(error), READER_GONE if error.is_reader_gone else CANNOT)
    except (UnusableInputError, OSError) as error:
        fail(command, str(error))


class OutputLostError(BaseException):
    """Standard output cannot be written. As Ctrl-C, it ends what runs, and is no error of whoever happens to print."""

    def __init__(self, error: OSError) -> None:
        self.is_reader_gone = isinstance(error, BrokenPipeError)
        lost = f"standard output cannot be written: {error.strerror}"
        super().__init__("whoever read the output has gone" if self.is_reader_gone else lost)


class Output(io.FileIO):
    """Standard output, which tells its own errors from those of other files."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            discard(self.fileno())
            raise OutputLostError(error) from error


def discard(number: int) -> None:
    """Let what an open file still holds go nowhere, or Python would try to write it at its end, and fail once more."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, number)
    os.close(nowhere)


def open_streams() -> None:
    """Make the standard streams usable however the command was started.

    A stream that was closed is none for Python, and leaves its number to the next file that is opened: it becomes one
    that holds nothing. Names of files need not be characters: what standard output has no letter for is escaped.
    """
    buffer = getattr(sys.stdout, "buffer", None)
    raw = getattr(buffer, "raw", buffer)  # without a buffer where Python was told so
    if isinstance(raw, io.FileIO) and isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout = io.TextIOWrapper(
            io.BufferedWriter(Output(raw.fileno(), "w", closefd=False)),
            encoding=sys.stdout.encoding,
            errors="backslashreplace",
            line_buffering=sys.stdout.line_buffering,
            write_through=sys.stdout.write_through,
        )
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
