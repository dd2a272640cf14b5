"""All questions about a context in one forward pass, on any entries, for the ablation and the reading layers.

The same numbers as `kvcluster.evaluation.quality` gives, several times sooner: all questions are one row of tokens,
each at the context's end and blind to all others. For Llamas only.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache

from kvcluster.evaluation.quality import Case, needle_cases
from kvcluster.evaluation.quality.llama import Attend, forward, logits_of, read_layers
from kvcluster.evaluation.quality.scoring import NeedleScore, judged
from kvcluster.evaluation.texts import built_in_text, encode
from kvcluster.fast.huggingface.fingerprints import weights_digest

__all__ = ["Context", "Held", "answer_spans", "exact", "following_nll", "needle_spans", "read_contexts", "score"]

CACHED = Path(__file__).resolve().parents[2] / ".cache" / "contexts"


@dataclass(frozen=True, eq=False)
class Held:
    """What one layer stores: `counts` are the tokens of each entry."""

    keys: Float[Tensor, "kv_heads entries dim"]
    values: Float[Tensor, "kv_heads entries dim"]
    counts: Int[Tensor, "kv_heads entries"]


@dataclass(frozen=True, eq=False)
class Context:
    """A case and the keys and values of all its tokens, one pair (kv_heads, tokens, dim) for each layer."""

    case: Case
    read: list[tuple[Tensor, Tensor]]

    def full_cache(self, config: Any) -> DynamicCache:
        """As transformers' own cache."""
        cache = DynamicCache(config=config)
        for layer, (keys, values) in enumerate(self.read):
            cache.update(keys[None], values[None], layer)
        return cache


def read_contexts(model: Any, tokenizer: Any, which: str, kind: str, **sizes: Any) -> list[Context]:
    """Contexts of the set `which` with needles of one kind; what was read before is kept in `.cache/contexts`.

    `sizes` are those of `needle_cases`.
    """
    cases = needle_cases(tokenizer, encode(tokenizer, built_in_text()), which, kinds=(kind,), **sizes)
    weights = weights_digest(model)
    CACHED.mkdir(parents=True, exist_ok=True)
    contexts = []
    for case in cases:
        path = CACHED / f"{weights}-{case.fingerprint}.pt"
        if not path.exists():
            torch.save(read_layers(model, case.tokens), path.with_suffix(".part"))
            path.with_suffix(".part").rename(path)
        contexts.append(Context(case, torch.load(path)))
    return contexts


def exact(read: list[tuple[Tensor, Tensor]]) -> list[Held]:
    """Every token, each an entry of its own."""
    return [Held(keys, values, torch.ones(keys.shape[:2], dtype=torch.int64)) for keys, values in read]


def needle_spans(case: Case) -> list[slice]:
    """Where in the context each needle stands: from its first token, as many as its question and its answer have."""
    starts = [round(needle.depth * len(case.tokens)) for needle in case.needles]
    lengths = [len(needle.question) + len(needle.answer) for needle in case.needles]
    return [slice(start, start + length) for start, length in zip(starts, lengths, strict=True)]


def answer_spans(case: Case) -> list[slice]:
    """Rows of `score` that predict the answer of each needle."""
    spans, first = [], 0
    for needle in case.needles:
        start = first + len(needle.question) - 1  # a token is predicted at the one before it
        spans.append(slice(start, start + len(needle.answer)))
        first += len(needle.question) + len(needle.answer) - 1
    return spans


def score(
    model: Any, case: Case, held: list[Held], *, watch: Callable[[int, Tensor], object] | None = None
) -> list[NeedleScore]:
    """Scores of all needles, asked of `held`, one of each layer.

    `watch` is given each layer's number and its weights (heads, rows, entries) on what is stored.
    """
    asked = [(needle.question + needle.answer, len(needle.answer)) for needle in case.needles]
    scores = predict(model, len(case.tokens), held, asked, watch)
    return [NeedleScore(is_right.tolist(), nll.tolist()) for is_right, nll in scores]


def following_nll(model: Any, case: Case, held: list[Held]) -> list[float]:
    """Nats of each token that follows the context, except the first."""
    [(_, nll)] = predict(model, len(case.tokens), held, [(case.following, len(case.following) - 1)], None)
    return nll.tolist()


@torch.inference_mode()
def predict(
    model: Any,
    n_context: int,
    held: list[Held],
    asked: list[tuple[list[int], int]],
    watch: Callable[[int, Tensor], object] | None,
) -> list[tuple[Tensor, Tensor]]:
    """Of each text's last tokens, as many as its number says: whether each is predicted, and its nats."""
    read = [text[:-1] for text, _ in asked]
    tokens = torch.tensor([token for text in read for token in text])
    owner = torch.tensor([number for number, text in enumerate(read) for _ in text])
    positions = torch.tensor([n_context + place for text in read for place in range(len(text))])
    is_seen = (owner[:, None] == owner) & (positions[:, None] >= positions)  # (rows, rows)
    mask = torch.zeros(is_seen.shape).masked_fill(~is_seen, -math.inf)
    hidden = forward(model, tokens[None], positions[None], attention_to(model, held, mask, watch))[0]
    ends = [sum(map(len, read[: number + 1])) for number in range(len(read))]
    rows = [row for end, (_, n) in zip(ends, asked, strict=True) for row in range(end - n, end)]
    right = torch.tensor([token for text, n in asked for token in text[-n:]])
    numbers = [n for _, n in asked]
    is_right, nll = judged(logits_of(model, hidden[torch.tensor(rows)]), right)
    return list(zip(is_right.split(numbers), nll.split(numbers), strict=True))


def attention_to(
    model: Any, held: list[Held], mask: Float[Tensor, "rows rows"], watch: Callable[[int, Tensor], object] | None
) -> Attend:
    """Attention of tokens to what each layer stores, and to each other as `mask` allows."""

    def attend(number: int, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        stored, scaling = held[number], model.model.layers[number].self_attn.scaling
        outputs = []
        for head, rows in enumerate(query[0].chunk(keys.shape[1])):  # (group, rows, dim)
            on_stored = rows @ stored.keys[head].T * scaling + stored.counts[head].float().log()
            on_new = rows @ keys[0, head].T * scaling + mask
            weights = torch.cat([on_stored, on_new], dim=-1).softmax(dim=-1)
            n_stored = on_stored.shape[-1]
            if watch is not None:
                watch(number, weights[..., :n_stored])
            outputs.append(weights[..., :n_stored] @ stored.values[head] + weights[..., n_stored:] @ values[0, head])
        return torch.cat(outputs)[None]  # (1, heads, rows, dim)

    return attend
