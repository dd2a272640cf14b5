"""A context as it is read, before any question or with one, and the caches that methods make of it.

Question later: a cache reads the context and is compressed, before anything is asked. Question first: the prompt is the
context and one question, read exactly; the cache is compressed after both, as the published method is used (as a digest
of arXiv:2506.11418v1 has it). So the first token of an answer comes from the exact prefill, whatever the cache, and all
later ones from what the cache stores.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .methods import Method
from .scoring import copy_rows, fill, prefill, read

__all__ = ["Asked", "Context"]


KEPT_BYTES = 2**32  # the most that full caches of prompts may take, which are kept for the next method


class Context:
    """Tokens and transformers' own cache of them, `full`, for which the model reads them when it is first needed.

    `queries` of each layer are known once a method that sees them has read the tokens; None of a layer that has none.
    """

    def __init__(self, model: Any, tokens: list[int]) -> None:
        self.model, self.tokens = model, tokens
        self.asked: dict[tuple[int, ...], Asked] = {}
        self.queries: list[Tensor | None] | None = None

    @cached_property
    def full(self) -> Any:
        return prefill(self.model, lambda model: None, self.tokens)

    def cache(self, method: Method, keep: float) -> Any:
        """The cache of a method after all tokens: filled from `full` where the method sees no more than that."""
        cache = method.make(self.model, keep, len(self.tokens))
        if cache is None:
            return self.full
        if method.is_blind:
            return fill(cache, self.full)
        if self.queries is not None:
            return fill(cache, self.full, queries=self.queries)
        with watched(cache) as self.queries:
            return prefill(self.model, lambda model: cache, self.tokens)

    @torch.inference_mode()
    def ask(self, question: list[int]) -> "Asked":
        """The prompt of these tokens and a question, of which only the question is read anew, exactly.

        It is kept for the next method that is asked the same, if there is room, and so is to be left as it is.

        Raises
        ------
        ValueError : a question without tokens.
        """
        if not question:
            raise ValueError("question must have at least one token, got none")
        known = self.asked.get(tuple(question))
        if known is not None:
            return known
        full = copy_rows(self.full)
        logits = read(self.model, full, torch.tensor([question], device=self.model.device))
        prompt = Context(self.model, self.tokens + question)
        prompt.full = full
        asked = Asked(prompt, logits[0, -1].clone())  # without those of the other tokens
        nbytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in full.layers)
        if (len(self.asked) + 1) * nbytes <= KEPT_BYTES:
            self.asked[tuple(question)] = asked
        return asked


@contextmanager
def watched(cache: Any) -> Iterator[list[Tensor | None]]:
    """The queries that each layer of a cache of ours is shown meanwhile, in one call of the model."""
    queries: list[Tensor | None] = [None] * len(cache.layers)

    def keep(index: int, observe: Callable[[Tensor], None], query: Tensor) -> None:
        queries[index] = query
        observe(query)

    watched_layers = [(index, layer) for index, layer in enumerate(cache.layers) if not layer.is_sliding]
    for index, layer in watched_layers:
        layer.observe = partial(keep, index, layer.observe)
    try:
        yield queries
    finally:
        for _, layer in watched_layers:
            del layer.observe


@dataclass(frozen=True)
class Asked:
    """A context with one question behind it, and the logits after the last token of that."""

    prompt: Context
    logits: Float[Tensor, " vocabulary"]
