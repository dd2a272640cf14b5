"""Answers from a cache, and how good they are.

A cache that read a context and no question is asked with copies of it, so that no question affects another. A cache
that read one question too is made for that one alone, see `reading`, and is used up by the answer.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from transformers import DynamicCache

from .cases import Needle

__all__ = [
    "NeedleScore",
    "copy_rows",
    "fill",
    "following_nll",
    "generate",
    "generate_on",
    "prefill",
    "read",
    "score_answers",
    "score_needles",
]

COPIED_BYTES = 2**30  # the most that caches side by side may take
N_PIECE = 4096  # tokens that are read at once


@torch.inference_mode()
def prefill(model: Any, make: Callable[[Any], Any], tokens: list[int]) -> Any:
    """The cache of `make(model)`, transformers' own where that is None, after the model read `tokens`.

    A cache of ours reads them in one call, transformers' own in pieces, so that masks and logits stay small.
    """
    own = make(model)
    if own is not None:
        model(torch.tensor([tokens], device=model.device), past_key_values=own, logits_to_keep=1)
        return own
    cache = DynamicCache(config=model.config)
    for piece in torch.tensor([tokens], device=model.device).split(N_PIECE, dim=1):
        model(piece, past_key_values=cache, logits_to_keep=1)
    return cache


@torch.inference_mode()
def fill(
    cache: Any,
    full: Any,
    *,
    queries: Sequence[Tensor | None] | None = None,
    on_layer: Callable[[], object] = lambda: None,
) -> Any:
    """`cache`, one of ours and empty, with the tokens of `full`, transformers' own: as if the model had read them.

    `queries` of each layer, (1, heads, tokens, dim), are for methods that see them; `on_layer` is called after each.

    A first call attends to its tokens exactly, whatever the cache; so keys and values are the same, bit for bit.
    Layers with a sliding window are transformers' own in both: `cache` gets copies of them.
    """
    for index, read_before in enumerate(full.layers):
        layer = cache.layers[index]
        if layer.is_sliding:
            cache.layers[index] = copy.deepcopy(read_before)
        else:
            layer.is_announced = True  # as by the hooks on a model
            layer.update(read_before.keys, read_before.values)
            if queries is not None and queries[index] is not None:
                layer.observe(queries[index])
            layer.finish()
        on_layer()
    return cache


def copy_rows(cache: Any, n_rows: int = 1) -> Any:
    """A copy of a cache of one sequence, the same in each of `n_rows` rows."""
    copied = copy.deepcopy(cache)
    if n_rows > 1:
        copied.batch_repeat_interleave(n_rows)
    return copied


def read(
    model: Any, cache: Any, tokens: Int64[Tensor, "rows tokens"], *, is_stepwise: bool = False
) -> Float[Tensor, "rows tokens vocabulary"]:
    """Logits after each of `tokens`, which `cache` takes in one call, or each in a call of its own."""
    steps = tokens.split(1, dim=1) if is_stepwise else (tokens,)
    return torch.cat([model(step, past_key_values=cache).logits for step in steps], dim=1)


@dataclass(frozen=True)
class NeedleScore:
    """`is_right` and `nll`, nats, of each token of an answer, each predicted after the true ones before it."""

    is_right: list[bool]
    nll: list[float]


@torch.inference_mode()
def score_needles(
    model: Any, cache: Any, needles: list[Needle], *, nbytes: int, is_stepwise: bool = False
) -> list[NeedleScore]:
    """Score of every needle, asked of copies of `cache` (of `nbytes` bytes), as many side by side as fit in a gibibyte.

    With `is_stepwise` each token of question and answer comes alone, as in decoding, and is clustered when it is due.
    """
    n_rows = max(1, COPIED_BYTES // max(1, nbytes))
    scores: list[NeedleScore] = []
    for first in range(0, len(needles), n_rows):
        asked = needles[first : first + n_rows]
        rows = [needle.question + needle.answer for needle in asked]
        longest = max(map(len, rows))
        # Padding on the right is behind all that counts: nothing attends to it.
        padded = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=model.device)
        logits = read(model, copy_rows(cache, len(rows)), padded[:, :-1], is_stepwise=is_stepwise)
        for needle, predicted in zip(asked, logits, strict=True):
            start, n_answer = len(needle.question) - 1, len(needle.answer)  # a token is predicted at the one before it
            answer = torch.tensor(needle.answer, device=model.device)
            is_right, nll = judged(predicted[start : start + n_answer], answer)
            scores.append(NeedleScore(is_right.tolist(), nll.tolist()))
    return scores


@torch.inference_mode()
def score_answers(
    model: Any,
    cache: Any,
    logits: Float[Tensor, "rows vocabulary"],
    answers: list[list[int]],
    *,
    is_stepwise: bool = False,
) -> list[NeedleScore]:
    """Score of the answer of each row to the question that `cache` has read; the cache is used up.

    `logits`, those after the question, predict the first token; the others are predicted from the cache, which takes
    the true ones before them in one call, or one by one with `is_stepwise`.
    """
    longest = max(map(len, answers))
    # Padding on the right is behind all that counts: nothing attends to it.
    padded = torch.tensor([answer + [0] * (longest - len(answer)) for answer in answers], device=model.device)
    predicted = logits[:, None]  # (rows, tokens, vocabulary)
    if longest > 1:
        read_after = read(model, cache, padded[:, :-1], is_stepwise=is_stepwise)
        predicted = torch.cat([predicted, read_after], dim=1)
    scores = []
    for answer, row, logits_of_row in zip(answers, padded, predicted, strict=True):
        is_right, nll = judged(logits_of_row[: len(answer)], row[: len(answer)])
        scores.append(NeedleScore(is_right.tolist(), nll.tolist()))
    return scores


@torch.inference_mode()
def following_nll(model: Any, cache: Any, tokens: list[int], *, is_stepwise: bool = False) -> list[float]:
    """Negative log-likelihood, nats, of each of `tokens` but the first, which continue the context of `cache`.

    The cache is left as it is. In one call the tokens attend to what it stores and to one another, exactly; with
    `is_stepwise` they come one by one and are clustered in their turn.
    """
    row = torch.tensor([tokens], device=model.device)
    logits = read(model, copy_rows(cache), row[:, :-1], is_stepwise=is_stepwise)
    return judged(logits[0], row[0, 1:])[1].tolist()


def judged(
    logits: Float[Tensor, "tokens vocabulary"], right: Int64[Tensor, " tokens"]
) -> tuple[Tensor, Float[Tensor, " tokens"]]:
    """Whether each right token has the highest logit, and its negative log-likelihood."""
    nll = torch.nn.functional.cross_entropy(logits.float(), right, reduction="none")
    return logits.argmax(dim=-1) == right, nll


@torch.inference_mode()
def generate(
    model: Any, cache: Any, question: list[int], *, n_new: int, stop: frozenset[int], is_stepwise: bool = False
) -> list[int]:
    """At most `n_new` tokens after `question`, each the likeliest, up to one of `stop`; `cache` is left as it is."""
    if not question:
        raise ValueError("question must have at least one token, got none")
    copied = copy_rows(cache)
    logits = read(model, copied, torch.tensor([question], device=model.device), is_stepwise=is_stepwise)
    return generate_on(model, copied, logits[0, -1], n_new=n_new, stop=stop)


@torch.inference_mode()
def generate_on(
    model: Any, cache: Any, logits: Float[Tensor, " vocabulary"], *, n_new: int, stop: frozenset[int]
) -> list[int]:
    """As `generate`, after `logits`, those of the last token that `cache` has read; the cache is used up."""
    generated: list[int] = []
    while len(generated) < n_new:
        token = int(logits.argmax())
        if token in stop:
            break
        generated.append(token)
        if len(generated) < n_new:
            logits = read(model, cache, torch.tensor([[token]], device=model.device))[0, -1]
    return generated
