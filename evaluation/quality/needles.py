"""Contexts with planted needles: sentences with an ending that nobody can guess, each asked for afterwards.

Everything follows from the set's name and the context's number, so every method is asked the same, on every machine
that has the same text.
"""

import random
from collections.abc import Iterable, Sequence
from typing import Any

from ..texts import encode, opening, span
from .cases import Case, Needle
from .words import KINDS, SENTENCES, WORDS

__all__ = ["DIGITS", "needle_cases", "plant", "scatter"]

DIGITS = 7  # of each number


def needle_cases(
    tokenizer: Any,
    text: list[int],
    which: str,
    *,
    lengths: Iterable[int],
    n_contexts: int,
    n_needles: int = 12,
    n_following: int = 512,
    kinds: Sequence[str] = KINDS,
) -> list[Case]:
    """`n_contexts` contexts of each length, with `n_needles` needles in each: the grid of depths and lengths.

    Parameters
    ----------
    text : tokens; `which` half of it is read, "tuning" or "reporting".
    n_following : tokens after the context that are predicted, for perplexity.
    kinds : what answers are made of, equally many needles of each: "digits" (seven) or "words" (two common ones).

    Raises
    ------
    ValueError : a text too short, more needles than sentences, contexts without room for their needles.
    """
    return [
        needle_case(
            tokenizer, text, which, number, n_tokens=n, n_needles=n_needles, n_following=n_following, kinds=kinds
        )
        for n in lengths
        for number in range(n_contexts)
    ]


def needle_case(
    tokenizer: Any,
    text: list[int],
    which: str,
    number: int,
    *,
    n_tokens: int,
    n_needles: int,
    n_following: int,
    kinds: Sequence[str] = KINDS,
) -> Case:
    """Context `number` of a set, exactly `n_tokens` tokens with its needles."""
    n_read = n_following + 1 if n_following else 0
    haystack = span(text, which, number, n_tokens + n_read)
    rng = random.Random(f"{which} {number}")
    tokens, needles, n_text = plant(
        tokenizer, haystack, rng, which=which, n_tokens=n_tokens, n_needles=n_needles, kinds=kinds
    )
    return Case("needles", number, tokens, haystack[n_text : n_text + n_read], needles)


def plant(
    tokenizer: Any,
    haystack: list[int],
    rng: random.Random,
    *,
    which: str,
    n_tokens: int,
    n_needles: int,
    kinds: Sequence[str] = KINDS,
) -> tuple[list[int], list[Needle], int]:
    """Tokens of a context, its needles, and how many tokens of the haystack it took.

    The needles stand in random order, each at a random place of its own n-th of the text.
    """
    if n_needles < 1:
        raise ValueError(f"n_needles must be at least 1, got {n_needles}")
    unknown = sorted(set(kinds) - set(KINDS))
    if unknown or not kinds:
        raise ValueError(f"kinds must be of {', '.join(KINDS)}, got {', '.join(unknown) or 'none'}")
    chosen: list[tuple[str, str]] = []
    for place, kind in enumerate(kinds):
        sentences = SENTENCES[which, kind]
        n_wanted = len(range(place, n_needles, len(kinds)))
        if n_wanted > len(sentences):
            raise ValueError(f"n_needles must be at most {len(sentences) * len(kinds)}, got {n_needles}")
        chosen += [(kind, sentence) for sentence in rng.sample(sentences, n_wanted)]
    if len(kinds) > 1:
        rng.shuffle(chosen)
    answers = [answer_of(kind, rng) for kind, _ in chosen]
    sentences = [f" {sentence} {answer}. " for (_, sentence), answer in zip(chosen, answers, strict=True)]
    start = opening(tokenizer)
    planted = [encode(tokenizer, sentence) for sentence in sentences]
    tokens, places, n_text = scatter(haystack, planted, rng, n_tokens - len(start))
    needles = []
    for (kind, sentence), answer, place in zip(chosen, answers, places, strict=True):
        question, right = ask(tokenizer, f"\n\n{sentence}", answer, kind)
        needles.append(Needle(question, right, kind, (len(start) + place) / n_tokens))
    return start + tokens, needles, n_text


def answer_of(kind: str, rng: random.Random) -> str:
    """Seven random digits, or two of the common words."""
    return "".join(rng.choices("0123456789", k=DIGITS)) if kind == "digits" else " ".join(rng.sample(WORDS, 2))


def ask(tokenizer: Any, sentence: str, answer: str, kind: str) -> tuple[list[int], list[int]]:
    """Tokens of a question and of its answer: those of both together, cut where the answer begins.

    A number's space belongs to the question: tokenizers that keep digits apart give it a token of its own.
    """
    question = encode(tokenizer, f"{sentence} " if kind == "digits" else sentence)
    both = encode(tokenizer, f"{sentence} {answer}")
    n_same = next((i for i, (a, b) in enumerate(zip(question, both, strict=False)) if a != b), len(question))
    return both[:n_same], both[n_same:]


def scatter(
    haystack: list[int], planted: list[list[int]], rng: random.Random, n_tokens: int
) -> tuple[list[int], list[int], int]:
    """`n_tokens` tokens with each of `planted` somewhere in its own n-th of the text, in order.

    Returns the tokens, the place of each planted one, and how many tokens of the haystack were taken.
    """
    n_text = n_tokens - sum(map(len, planted))
    if n_text < len(planted):
        raise ValueError(
            f"n_tokens must leave room for text beside {n_tokens - n_text} tokens of needles, got {n_tokens}"
        )
    cuts = [int((i + rng.uniform(0.1, 0.9)) * n_text / len(planted)) for i in range(len(planted))]
    tokens: list[int] = []
    places = []
    for needle, start, stop in zip(planted, [0, *cuts], cuts, strict=False):
        tokens += haystack[start:stop]
        places.append(len(tokens))
        tokens += needle
    return tokens + haystack[cuts[-1] : n_text], places, n_text
