"""Text as tokens, and the spans of it that contexts are made of.

Settings are tuned on the first half of a text and results are reported on the second, so that no token is in both.
"""

from pydoc_data.topics import topics
from typing import Any

__all__ = ["SETS", "built_in_text", "encode", "opening", "span"]

SETS = ("tuning", "reporting")


def built_in_text() -> str:
    """The Python language reference as pydoc has it: about 465,000 characters of English, other ones in each Python."""
    return "\n\n".join(topics[name] for name in sorted(topics))


def encode(tokenizer: Any, text: str) -> list[int]:
    """Tokens of `text` as it stands inside of a longer one."""
    tokens: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return tokens


def opening(tokenizer: Any) -> list[int]:
    """Tokens that the tokenizer puts before every text; none for many."""
    tokens: list[int] = tokenizer("").input_ids
    return tokens


def span(tokens: list[int], which: str, number: int, length: int) -> list[int]:
    """Span `number` of `length` tokens in the half of `tokens` that belongs to a set: they do not overlap.

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
