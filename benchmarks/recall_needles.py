"""What the recall benchmark reads and asks: sentences that end in a number, planted in a long text.

Two sets of sentences, each in a part of its own of the Python language reference: settings were chosen on "tuning",
results are reported on "reporting".
"""

import random
from dataclasses import dataclass
from pydoc_data.topics import topics
from typing import Any

__all__ = ["DIGITS", "SENTENCES", "Context", "plant"]

DIGITS = 7  # of each number; each digit is a token of SmolLM2's
SENTENCES = {
    "tuning": [
        "The phone number of the bakery in Paris is",
        "The combination of Oscar's bicycle lock is",
        "The weight of the blue whale in the museum is",
        "The secret code for the garden gate is",
        "The ticket number of the lucky winner is",
        "Maria's library card has the number",
        "The serial number of the old violin is",
        "The treasure map says to walk this many steps:",
        "The license plate of the red truck is",
        "The password of the weather station is",
        "The population of the village of Elmwood is",
        "The bank account of Doctor Hansen has the number",
    ],
    "reporting": [
        "The access code of the Boston office is",
        "The train to Vienna has the number",
        "The safe behind the painting opens with",
        "The radio frequency of the lighthouse is",
        "Captain Miller's badge number is",
        "The invoice for the wooden chairs has the number",
        "The asteroid seen from Chile has the name",
        "The winning lottery number in Lisbon was",
        "The parcel for Aunt Sophie has the tracking code",
        "The PIN of the coffee machine is",
        "The patient in the yellow room has the identifier",
        "The spaceship will land at the coordinate",
    ],
}
FIRST_TOKEN = {"tuning": 0, "reporting": 60_000}  # of 113,108
STRIDE = 5_000  # tokens from one context's text to the next one's


@dataclass(frozen=True)
class Context:
    """A text with needles, as tokens; question i is answered by answer i, `DIGITS` tokens."""

    tokens: list[int]
    questions: list[list[int]]
    answers: list[list[int]]


def plant(tokenizer: Any, which: str, number: int, *, n_tokens: int, n_needles: int) -> Context:
    """Context `number` of a set: the needles in random order, each at a random place of its own n-th of the text.

    A question repeats the sentence up to its number.
    """
    rng = random.Random(f"{which} {number}")
    sentences = rng.sample(SENTENCES[which], n_needles)
    numbers = ["".join(rng.choices("0123456789", k=DIGITS)) for _ in sentences]
    planted = [
        tokenizer(f" {sentence} {number}. ").input_ids for sentence, number in zip(sentences, numbers, strict=True)
    ]
    n_text = n_tokens - sum(map(len, planted))
    if n_text < n_needles:
        raise ValueError(f"n_tokens must leave room for text beside {n_tokens - n_text} tokens of needles")
    first = FIRST_TOKEN[which] + STRIDE * number
    text = tokenizer("\n\n".join(topics[name] for name in sorted(topics))).input_ids[first : first + n_text]
    cuts = [int((i + rng.uniform(0.1, 0.9)) * n_text / n_needles) for i in range(n_needles)]
    tokens: list[int] = []
    for needle, start, stop in zip(planted, [0, *cuts], cuts, strict=False):
        tokens += text[start:stop] + needle
    tokens += text[cuts[-1] :]
    questions = [tokenizer(f"\n\n{sentence} ").input_ids for sentence in sentences]
    answers = [tokenizer(number).input_ids for number in numbers]
    return Context(tokens, questions, answers)
