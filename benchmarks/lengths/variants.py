"""Parts of the cache of a profile alone: its window, its shares, its chunks; and recall by each query head."""

from typing import Any

from kvcluster.evaluation.quality.methods import (
    DISTINCTIVE,
    Method,
    body_entries,
    body_ratio,
    shipped,
    with_growing_window,
)
from kvcluster.fast import Distinctive
from kvcluster.fast.huggingface import ClusteredCache, RecallCache

__all__ = ["RECALL", "VARIANTS"]

LARGEST_CHUNK, FIFTH = 1024, 0.2
METHOD = Distinctive(n_shared=4)
ALIKE: dict[str, Any] = {"method": METHOD, "profile": None}


def with_fixed_window(model: Any, keep: float, n_tokens: int) -> ClusteredCache:
    ratio = body_ratio(keep, n_tokens)
    return ClusteredCache.for_model(model, keep_ratio=ratio, method=METHOD, profile=shipped(model), **DISTINCTIVE)


def with_twice_the_window(model: Any, keep: float, n_tokens: int) -> ClusteredCache:
    ratio, sizes = with_growing_window(keep, n_tokens, FIFTH)
    return ClusteredCache.for_model(model, keep_ratio=ratio, method=METHOD, profile=shipped(model), **sizes)


def with_window_alone(model: Any, keep: float, n_tokens: int) -> ClusteredCache:
    ratio, sizes = with_growing_window(keep, n_tokens, FIFTH)
    size = sizes["chunk_size"]
    return ClusteredCache.for_model(model, keep_ratio=int(ratio * size) / size, **ALIKE, **sizes)


def with_large_chunks(model: Any, keep: float, n_tokens: int) -> ClusteredCache:
    n_body = n_tokens - DISTINCTIVE["n_sink"] - DISTINCTIVE["n_recent"]
    size = next(size for size in range(LARGEST_CHUNK, 0, -1) if n_body % size == 0)  # no token is left over
    sizes = DISTINCTIVE | {"chunk_size": size}
    return ClusteredCache.for_model(model, keep_ratio=body_entries(keep, n_tokens, **sizes) / size, **ALIKE, **sizes)


def recall_of_each_query_head(model: Any, keep: float, n_tokens: int) -> RecallCache:
    return RecallCache.for_model(model, budget=int(keep * n_tokens), is_per_query_head=True)


VARIANTS = {
    "profile-fixed": Method(with_fixed_window, "the profile, 252 recent tokens", is_blind=True, profile=shipped),
    "profile-fifth": Method(with_twice_the_window, "the profile, a fifth recent", is_blind=True, profile=shipped),
    "alike-fifth": Method(with_window_alone, "all heads alike, a fifth recent", is_blind=True),
    "alike-1000": Method(with_large_chunks, "all heads alike, chunks of about 1,000 tokens", is_blind=True),
}
RECALL = {
    "recall-heads": Method(
        recall_of_each_query_head,
        "each query head recalls its own tokens",
        stores_all=True,
        is_stepwise=True,
        is_blind=True,
    )
}
