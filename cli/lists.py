"""Options that are lists: what commas separate, and the numbers among them."""

from typing import TypeVar

from .refusing import fail

__all__ = ["items", "number"]

Number = TypeVar("Number", int, float)


def items(text: str) -> list[str]:
    """What commas separate, without what is empty."""
    return [item.strip() for item in text.split(",") if item.strip()]


def number(command: str, name: str, text: str, kind: type[Number]) -> Number:
    """The number that `text` spells; of anything else the command fails."""
    try:
        return kind(text)
    except ValueError:
        fail(command, f"{name} must be {'whole numbers' if kind is int else 'numbers'}, got {text!r}")
