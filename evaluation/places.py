"""Places that results go to: looked at before hours of work, and named when they cannot be written after all."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import UnusableInputError

__all__ = ["check_file", "check_folder", "writing"]


def check_file(path: Path) -> None:
    """Refuse a place where no file can be written. What is there is left as it is, a device or a pipe unopened.

    Raises
    ------
    UnusableInputError : no such folder; a folder; not to be written.
    """
    if not path.absolute().parent.is_dir():
        raise UnusableInputError(f"{path} must be a file in an existing folder")
    file = Path(os.path.realpath(path))  # of a link, what it would make
    is_new = not file.exists()
    if is_new or file.is_file() or file.is_dir():
        with writing(path):
            file.open("ab").close()
        if is_new:
            file.unlink()


def check_folder(path: Path) -> None:
    """Refuse what is no folder in which files can be made.

    Raises
    ------
    UnusableInputError : no folder, or not to be written to.
    """
    if not path.is_dir():
        raise UnusableInputError(f"{path} must be a folder that exists")
    with writing(path):
        tempfile.TemporaryFile(dir=path).close()


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Of an error of the system while `path` is written the line that names it: that of a full disk names no file.

    Raises
    ------
    UnusableInputError : the error.
    """
    try:
        yield
    except OSError as error:
        raise UnusableInputError(f"{path} cannot be written: {error.strerror or error}") from error
