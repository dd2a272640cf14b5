"""Text as tokens, and the spans of it that contexts are made of.

Settings are tuned on the first half of a text and results are reported on the second, so that no token is in both.
"""

from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch

from .errors import UnusableInputError, refused

__all__ = ["SETS", "built_in_text", "encode", "load_tokens", "opening", "read_text", "span"]

SETS = ("tuning", "reporting")
READS = "model must have a tokenizer that reads the text"


def built_in_text() -> str:
    """The Python language reference as pydoc has it: about 465,000 characters of English; versions differ."""
    return "\n\n".join(topics[name] for name in sorted(topics))


def read_text(path: Path, name: str = "text") -> str:
    """The content of a text file; `name` is what a message calls it."""
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UnusableInputError(f"{name} must be a readable UTF-8 file, got {path}: {error}") from error


def load_tokens(text: str | None, tokenizer: Any, wanted: int) -> torch.Tensor:
    """The first `wanted` tokens, (1, wanted), of `text` or of the built-in text, read as a text of its own.

    Raises
    ------
    UnusableInputError : a shorter text, or one that the tokenizer fails at.
    """
    with refused(READS):
        tokens = tokenizer(built_in_text() if text is None else text, return_tensors="pt").input_ids[:, :wanted]
    if tokens.shape[1] < wanted:
        raise UnusableInputError(f"text must have at least {wanted} tokens, got {tokens.shape[1]}")
    return tokens


def encode(tokenizer: Any, text: str) -> list[int]:
    """Tokens of `text` as part of a longer text."""
    with refused(READS):
        tokens: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return tokens


def opening(tokenizer: Any) -> list[int]:
    """Tokens that the tokenizer puts before every text; none for many."""
    with refused(READS):
        tokens: list[int] = tokenizer("").input_ids
    return tokens


def span(tokens: list[int], which: str, number: int, length: int) -> list[int]:
    """Span `number` of `length` tokens in the half of `tokens` that belongs to a set; spans do not overlap.

    Raises
    ------
    ValueError : another set than "tuning" and "reporting"; a half that ends before the span does.
    """
    if which not in SETS:
        raise ValueError(f"which must be of {', '.join(SETS)}, got {which!r}")
    middle = len(tokens) // 2
    half = tokens[:middle] if which == "tuning" else tokens[middle:]
    if len(half) < (number + 1) * length:
        raise ValueError(
            f"text must have at least {(number + 1) * length:,} tokens in its {which} half for {number + 1} "
            f"contexts of {length:,}, got {len(half):,}"
        )
    return half[number * length : (number + 1) * length]
