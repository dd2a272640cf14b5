"""How a command says that it cannot do what was asked: one line on standard error, exit code 2."""

from pathlib import Path

from kvcluster.evaluation.commands import fail
from kvcluster.evaluation.places import check_file, check_folder

__all__ = ["check_places", "fail"]


def check_places(json: Path | None, figures: Path | None) -> None:
    """Refuse places that results cannot be written to, before there are any.

    Raises
    ------
    UnusableInputError : which of them, and why; what the command ends with.
    """
    if json is not None:
        check_file(json)
    if figures is not None:
        check_folder(figures)
