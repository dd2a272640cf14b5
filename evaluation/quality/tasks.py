"""Tasks like those of RULER, built here from any text: what is asked, how answers are judged, what a model must do.

After arXiv:2404.06654, in our own words and without its data: hidden numbers under one of several names, several under
one name, several asked for at once; variables set to one another; the words that a list or a coded text has most. As
there, an answered example comes first where a small model would not see what is asked of it.
"""

import random
import re
import string
from collections.abc import Callable
from typing import Any

from ..texts import encode, opening, span
from .cases import Case, Prompt
from .needles import scatter
from .words import WORDS

__all__ = ["TASKS", "task_case"]

N_HIDDEN = 4  # numbers under one name, or names, where a task has several
N_DISTRACTORS = 3  # other names with numbers of their own
N_HOPS = 4  # variables that are set to an earlier one
N_COMMON = 10  # words that a list has most often
N_FREQUENT = 3  # words that a coded text has most often
TIMES_OTHER = 2  # times that a list has each other word


def task_case(name: str, tokenizer: Any, text: str, tokens: list[int], which: str, number: int, n_tokens: int) -> Case:
    """Case `number` of the task `name`: at most `n_tokens` tokens of context, exactly as many where it is text.

    Parameters
    ----------
    text, tokens : of one text; its `which` half goes into the contexts, its words go into lists.

    Raises
    ------
    ValueError : another name than those of `TASKS`; a text too short; a context too short for what is to be hidden.
    """
    if name not in TASKS:
        raise ValueError(f"task must be of {', '.join(TASKS)}, got {name!r}")
    rng = random.Random(f"{name} {which} {number}")
    if name in LISTS:
        head, pieces, least, question, answers, n_new = LISTS[name](rng, text)
        context = fill(tokenizer, head, pieces, least, n_tokens)
    else:
        hidden, question, answers, n_new = HIDDEN[name](rng)
        head = HEAD + EXAMPLES[name](rng) if name in EXAMPLES else HEAD
        start = opening(tokenizer) + encode(tokenizer, head)
        planted = [encode(tokenizer, sentence) for sentence in hidden]
        haystack = span(tokens, which, number, n_tokens)
        context = start + scatter(haystack, planted, rng, n_tokens - len(start))[0]
    prompt = Prompt(encode(tokenizer, question), answers, "match all", n_new)
    return Case(f"ruler {name}", number, context, prompts=[prompt])


HEAD = "Remember what is hidden in the following text: you will be asked for it afterwards.\n\n"
Hidden = tuple[list[str], str, list[str], int]  # sentences, question, answers, tokens to generate


def one_of_each(rng: random.Random, n_names: int) -> tuple[list[str], list[str]]:
    """Different names and a random number for each."""
    return rng.sample(WORDS, n_names), ["".join(rng.choices(string.digits, k=7)) for _ in range(n_names)]


def single(rng: random.Random, n_distractors: int = 0) -> Hidden:
    names, numbers = one_of_each(rng, 1 + n_distractors)
    sentences = [f" The secret number of {a} is {b}. " for a, b in zip(names, numbers, strict=True)]
    rng.shuffle(sentences)
    question = f"\n\nQuestion: What is the secret number of {names[0]}?\nAnswer: The secret number of {names[0]} is"
    return sentences, question, numbers[:1], 16


def multi_key(rng: random.Random) -> Hidden:
    return single(rng, N_DISTRACTORS)


def multi_value(rng: random.Random) -> Hidden:
    [name], _ = one_of_each(rng, 1)
    _, numbers = one_of_each(rng, N_HIDDEN)
    question = (
        f"\n\nQuestion: What are all {N_HIDDEN} secret numbers of {name}?\n"
        f"Answer: The {N_HIDDEN} secret numbers of {name} are"
    )
    return [f" One of the secret numbers of {name} is {number}. " for number in numbers], question, numbers, 56


def multi_query(rng: random.Random) -> Hidden:
    names, numbers = one_of_each(rng, N_HIDDEN + N_DISTRACTORS)
    sentences = [f" The secret number of {a} is {b}. " for a, b in zip(names, numbers, strict=True)]
    rng.shuffle(sentences)
    asked = f"{', '.join(names[: N_HIDDEN - 1])} and {names[N_HIDDEN - 1]}"
    question = f"\n\nQuestion: What are the secret numbers of {asked}?\nAnswer: The secret numbers of {asked} are"
    return sentences, question, numbers[:N_HIDDEN], 56


def variable_tracking(rng: random.Random, n_hops: int = N_HOPS) -> Hidden:
    names: list[str] = []
    while len(names) <= n_hops:
        name = "".join(rng.choices(string.ascii_uppercase, k=5))
        names += [name] * (name not in names)
    value = str(rng.randrange(10_000, 100_000))
    values = [value, *(f"VAR {name}" for name in names)]
    sentences = [f" VAR {name} = {value_of_name}. " for name, value_of_name in zip(names, values, strict=False)]
    question = (
        f"\n\nQuestion: Find all variables that have the value {value}, directly or through others.\n"
        f"Answer: {len(names)} variables have the value {value}:"
    )
    return sentences, question, names, 48


def tracked_variables(rng: random.Random) -> str:
    """A chain of other variables with its answer."""
    sentences, question, names, _ = variable_tracking(rng)
    return f"For example:{''.join(sentences)}{question} {', '.join(names)}\n\n"


HIDDEN: dict[str, Callable[[random.Random], Hidden]] = {
    "single": single,
    "multi-key": multi_key,
    "multi-value": multi_value,
    "multi-query": multi_query,
    "variable tracking": variable_tracking,
}
EXAMPLES = {"variable tracking": tracked_variables}
Listed = tuple[str, Callable[[int], list[str]], int, str, list[str], int]
# head, pieces of a list by its size, the least size, question, answers, tokens to generate


def common_words(rng: random.Random, text: str) -> Listed:
    """After an example, a list that has ten words `size` times each, and as many entries of other words, each twice."""
    words = sorted(set(re.findall(r"\b[a-z]{4,10}\b", text)) | set(WORDS))
    rng.shuffle(words)
    common: list[str] = []
    for word in words:  # none within another: answers are looked for as parts of a text
        if len(common) < N_COMMON and not any(word in other or other in word for other in common):
            common.append(word)
    others = [word for word in words if word not in common]
    shown, others = others[: 2 * N_COMMON], others[2 * N_COMMON :]

    def pieces(size: int) -> list[str]:
        return numbered(common * size + others[: N_COMMON * size // TIMES_OTHER] * TIMES_OTHER, f"order {size}")

    example = "".join(numbered(shown[:N_COMMON] * 3 + shown[N_COMMON:], "example"))
    head = "A numbered list of words follows, some more often than others.\n\n"
    head += f"{example}{COMMON_QUESTION} {', '.join(shown[:N_COMMON])}\n\nThe next list:\n\n"
    return head, pieces, 2 * TIMES_OTHER, COMMON_QUESTION, common, 64


COMMON_QUESTION = (
    f"\nQuestion: What are the {N_COMMON} most common words in the last list?\n"
    f"Answer: The {N_COMMON} words that are most often in the last list are:"
)


def numbered(words: list[str], seed: str) -> list[str]:
    """Lines of a list of `words` in random order."""
    shuffled = random.Random(seed).sample(words, len(words))
    return [f"{number}. {word}\n" for number, word in enumerate(shuffled, 1)]


def frequent_words(rng: random.Random, text: str) -> Listed:
    """Made-up words, the k-th of them k squared times rarer than the first, which is dots and does not count."""
    words: list[str] = ["..."]
    while len(words) < 64:
        word = "".join(rng.choices(string.ascii_lowercase, k=6))
        words += [word] * (word not in words)

    def pieces(size: int) -> list[str]:
        listed = [word for rank, word in enumerate(words, 1) for _ in range(16 * size // rank**2)]
        random.Random(f"order {size}").shuffle(listed)
        return [f" {word}" for word in listed]

    question = (
        f"\n\nQuestion: Which {N_FREQUENT} words, dots aside, are most often in the coded text above?\n"
        f"Answer: The {N_FREQUENT} most frequent words are"
    )
    return "Coded text:", pieces, 2, question, words[1 : 1 + N_FREQUENT], 32


LISTS = {"common words": common_words, "frequent words": frequent_words}
TASKS = (*HIDDEN, *LISTS)


def fill(tokenizer: Any, head: str, pieces: Callable[[int], list[str]], least: int, n_tokens: int) -> list[int]:
    """Tokens of the head and of the largest list, of at least the size `least`, that fits."""
    start = opening(tokenizer)

    def of(size: int) -> list[int]:
        return start + encode(tokenizer, head + "".join(pieces(size)))

    tokens, size = of(least), least
    if len(tokens) > n_tokens:
        raise ValueError(f"n_tokens must be at least {len(tokens)} for the shortest list, got {n_tokens}")
    while len(longer := of(size + 1)) <= n_tokens:
        tokens, size = longer, size + 1
    return tokens
