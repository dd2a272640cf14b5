"""What the recall benchmark reads and asks: numbers planted in a long text, by `kvcluster.evaluation.quality`.

Two sets of sentences, each in its own part of the Python language reference: settings were chosen on "tuning", results
are reported on "reporting".
"""

import random
from dataclasses import dataclass
from typing import Any

from kvcluster.evaluation.quality import needles
from kvcluster.evaluation.texts import built_in_text, encode

__all__ = ["Context", "plant"]

FIRST_TOKEN = {"tuning": 0, "reporting": 60_000}  # of 113,108
STRIDE = 5_000  # tokens from the start of one context's text to the next


@dataclass(frozen=True)
class Context:
    """A text with needles, as tokens; question i is answered by answer i, seven tokens of SmolLM2's."""

    tokens: list[int]
    questions: list[list[int]]
    answers: list[list[int]]


def plant(tokenizer: Any, which: str, number: int, *, n_tokens: int, n_needles: int) -> Context:
    """Context `number` of a set: the needles in random order, each at a random place of its own n-th of the text.

    A question repeats the sentence up to its number.
    """
    text = encode(tokenizer, built_in_text())[FIRST_TOKEN[which] + STRIDE * number :]
    rng = random.Random(f"{which} {number}")
    tokens, planted, _ = needles.plant(
        tokenizer, text, rng, which=which, n_tokens=n_tokens, n_needles=n_needles, kinds=("digits",)
    )
    return Context(tokens, [needle.question for needle in planted], [needle.answer for needle in planted])
