"""What a call of an implementation raised, in words that another process can be told."""

import traceback
from pathlib import Path
from typing import NamedTuple

__all__ = ["Raised", "UnreadableError"]

HERE = Path(__file__).parent
MOST_FRAMES = 8


class UnreadableError(Exception):
    """What an implementation returned is no array of numbers. It has not refused its input by that."""


class Raised(NamedTuple):
    """An exception: its `repr`, the innermost lines of its traceback, and which of two kinds it is of.

    Attributes
    ----------
    text, lines : "ValueError('no')", and "file, line 3, in attention: raise ValueError" for each call outside of here.
    is_refusal : it is a ValueError or a TypeError.
    is_runtime_error : as many libraries refuse bad shapes.
    """

    text: str
    lines: tuple[str, ...] = ()
    is_refusal: bool = False
    is_runtime_error: bool = False

    @classmethod
    def of(cls, error: BaseException) -> "Raised":
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if is_of_others(frame.filename)]
        lines = [f"{frame.filename}, line {frame.lineno}, in {frame.name}: {frame.line}" for frame in frames]
        is_refusal = isinstance(error, ValueError | TypeError)
        return cls(repr(error), tuple(lines[-MOST_FRAMES:]), is_refusal, isinstance(error, RuntimeError))


def is_of_others(file: str) -> bool:
    return not file.startswith("<frozen") and HERE not in Path(file).parents
