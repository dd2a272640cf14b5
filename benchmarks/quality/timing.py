"""What compression costs beside the prefill of the same tokens, in one process, in turns."""

import time
from collections.abc import Callable
from typing import Any

import torch

from kvcluster.evaluation.quality import METHODS
from kvcluster.evaluation.quality.reading import Context
from kvcluster.evaluation.quality.scoring import fill, prefill

__all__ = ["time_compression"]


def time_compression(
    model: Any, tokens: list[int], pairs: list[tuple[str, float]], rounds: int, on_step: Callable[[], object]
) -> dict[str, Any]:
    """Seconds of each round: of the prefill, and of each method's cache taking its keys, values and queries.

    The latter is all that a cache does when the model reads a context: storing and compressing, without attention,
    which is the same for all. A first round is not counted.
    """
    queries = queries_of(model, tokens, pairs)
    seconds: dict[str, list[float]] = {"prefill": [], "full": [], **{label(*pair): [] for pair in pairs}}
    for number in range(rounds + 1):
        seconds_of_round: dict[str, float] = {}
        begun = time.perf_counter()
        full = prefill(model, lambda model: None, tokens)
        seconds_of_round["prefill"] = time.perf_counter() - begun
        begun = time.perf_counter()
        with torch.inference_mode():
            [(layer.keys.clone(), layer.values.clone()) for layer in full.layers]
        seconds_of_round["full"] = time.perf_counter() - begun
        on_step()
        for name, keep in pairs:
            cache = METHODS[name].make(model, keep, len(tokens))
            begun = time.perf_counter()
            fill(cache, full, queries=queries)
            seconds_of_round[label(name, keep)] = time.perf_counter() - begun
            on_step()
        if number:
            for part, value in seconds_of_round.items():
                seconds[part].append(round(value, 4))
    return {"tokens": len(tokens), "threads": torch.get_num_threads(), "seconds": seconds}


def queries_of(model: Any, tokens: list[int], pairs: list[tuple[str, float]]) -> Any:
    """The queries of each layer, from a first reading, if any method sees them."""
    context = Context(model, tokens)
    for name, keep in pairs:
        if not METHODS[name].is_blind:
            context.cache(METHODS[name], keep)
            break
    return context.queries


def label(name: str, keep: float) -> str:
    return f"{name} {keep:g}"
