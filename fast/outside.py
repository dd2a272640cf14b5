"""JSON that comes from outside, read so that whatever is wrong with it is a `ValueError` that names the key.

Python's own reader takes NaN for a number and 1e400 for infinity, and ends in errors of other classes where text is
nested deeply or an integer is long. A limit here is far beyond what any honest file holds.
"""

import json
import math
import reprlib
from pathlib import Path
from typing import Any

__all__ = ["check_plain", "json_of", "read_json", "shown"]

MOST_DEPTH = 32
MOST_DIGITS = 100  # of an integer, so that each is a float too
TOO_LONG = 10**MOST_DIGITS
MOST_BYTES = 2**24
QUOTE = "'"


class Unread(str):
    """A number that is none to count with, as it was written."""


def json_of(text: str, name: str) -> Any:
    """What the JSON `text` holds; `name` is said in errors.

    Raises
    ------
    ValueError : no JSON; nested too deeply; a number that is not finite, or an integer of too many digits.
    """
    try:
        value = json.loads(text, parse_float=finite, parse_int=short, parse_constant=Unread)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} must be JSON, got {shown(text)}: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{name} must be nested at most {MOST_DEPTH} deep, got more") from error
    check_plain(value, name)
    return value


def read_json(path: str | Path, name: str) -> Any:
    """`json_of` of a file.

    Raises
    ------
    FileNotFoundError : no such file.
    ValueError : as `json_of`; no plain file, too large a one, or no UTF-8.
    """
    path = Path(path)
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise ValueError(f"{name} must be a file, got {path}")
    if (n_bytes := path.stat().st_size) > MOST_BYTES:
        raise ValueError(f"{name} must have at most {MOST_BYTES:,} bytes, got {n_bytes:,}")
    content = path.read_bytes()
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} must be JSON in UTF-8, got {shown(content)}") from error
    return json_of(text, name)


def check_plain(value: Any, name: str, key: str = "", depth: int = 0) -> None:
    """Refuse objects and lists nested too deeply, or with a number that `json_of` refuses; `key` is where in `name`."""
    if depth > MOST_DEPTH:
        raise ValueError(f"{name} must be nested at most {MOST_DEPTH} deep, got more at {key[:80]}...")
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    for at, inner in inside:
        if type(inner) is not int or abs(inner) >= TOO_LONG:
            place = f"{key}[{at}]" if isinstance(at, int) else f"{key}.{spoken(at)}".lstrip(".")
            check_plain(inner, name, place, depth + 1)
    if rule := broken_rule(value):
        raise ValueError(f"{key or name}{f' of {name}' if key else ''} must be {rule}, got {shown(value).strip(QUOTE)}")


def broken_rule(value: Any) -> str | None:
    """What a number must be that `json_of` refuses; None for anything else."""
    is_unread = isinstance(value, Unread)
    if (is_unread and value.lstrip("-").isdigit()) or (isinstance(value, int) and abs(value) >= TOO_LONG):
        return f"an integer of at most {MOST_DIGITS} digits"
    return "a finite number" if is_unread or (isinstance(value, float) and not math.isfinite(value)) else None


def spoken(key: Any) -> str:
    """A key as it is, or as Python writes it if it is long or would not be seen."""
    return key if isinstance(key, str) and key.isidentifier() and len(key) < 80 else shown(key)


def finite(text: str) -> float | Unread:
    number = float(text)
    return number if math.isfinite(number) else Unread(text)


def short(text: str) -> int | Unread:
    return int(text) if len(text.lstrip("-")) <= MOST_DIGITS else Unread(text)


class Shown(reprlib.Repr):
    """`repr` of the beginning; of a long integer, which Python would refuse to write, its size."""

    def repr_int(self, number: int, level: int) -> str:
        if abs(number) >= TOO_LONG:
            return f"an integer of {number.bit_length():,} bits"
        return super().repr_int(number, level)


SHOWN = Shown()
SHOWN.maxstring = SHOWN.maxother = SHOWN.maxlong = 80


def shown(value: Any) -> str:
    """`value` for an error: printable, short, whatever it is.

    >>> len(shown("x" * 1000))
    80
    >>> shown({"a": [10**5000, "\\x1b"]})
    "{'a': [an integer of 16,610 bits, '\\\\x1b']}"
    """
    return SHOWN.repr(value)
