"""What a command says in one line when its input is of no use."""

import contextlib
from collections.abc import Iterator

__all__ = ["UnusableInputError", "one_line", "refused"]

MOST = 400  # characters of what a library says


class UnusableInputError(ValueError):
    """The user's input cannot be used; the message says why, in one line."""


def one_line(error: BaseException) -> str:
    """What an error says, without line breaks and without what a terminal would not show as text.

    >>> one_line(ValueError("two\\nlines, \\x1b[31m red"))
    'two lines, \\\\x1b[31m red'
    """
    said = " ".join(str(error).split())
    return "".join(x if x.isprintable() else ascii(x).strip("'") for x in said)


@contextlib.contextmanager
def refused(rule: str) -> Iterator[None]:
    """Whatever a library raises at input that it was not made for, as an error that says `rule` first.

    Such errors are of every class: what is written in Rust panics with one that is no `Exception`. An `ImportError`
    comes as it is, for it says what to install.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, ImportError, UnusableInputError):
        raise
    except BaseException as error:
        said = one_line(error)[:MOST] or type(error).__name__
        raise UnusableInputError(f"{rule}: {said}") from error
