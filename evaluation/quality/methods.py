"""The methods that can be compared, by name: a new one is one line of `METHODS`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kvcluster.fast import Distinctive, SoftMatching
from kvcluster.fast.huggingface import ClusteredCache, RecallCache, layer_ratios
from kvcluster.fast.methods import Method as ClusteringMethod

from ..models import READING_LAYERS

__all__ = ["METHODS", "Method", "chunked_keep_ratio"]

CHUNK_SIZE, N_SINK, N_RECENT = 64, 4, 64
DISTINCTIVE = {"chunk_size": 256, "n_sink": 4, "n_recent": 252}


@dataclass(frozen=True)
class Method:
    """How a cache is made.

    Attributes
    ----------
    make : from a model, `keep` and the tokens of the context, the cache that may store `keep * n_tokens` entries in
        each layer, sinks and recent tokens included; None for transformers' own.
    note : what tables say of it.
    has_keep : whether it depends on `keep`.
    stores_all : whether it stores every token, so that no budget of entries binds it.
    is_stepwise : whether tokens must come one by one for the method to be at work.
    is_blind : whether it decides by keys and values alone, so that its cache can be filled from a full one; for any
        other method the model reads each context again.
    """

    make: Callable[[Any, float, int], Any]
    note: str
    has_keep: bool = True
    stores_all: bool = False
    is_stepwise: bool = False
    is_blind: bool = False


def chunked_keep_ratio(keep: float, n_tokens: int) -> float:
    """The largest `keep_ratio` with which `n_tokens` tokens become at most `keep * n_tokens` entries, all included.

    Every chunk becomes a whole number of entries, so a few may be left over.
    """
    n_chunks = max(0, n_tokens - N_SINK - N_RECENT) // CHUNK_SIZE
    exact = n_tokens - n_chunks * CHUNK_SIZE
    n_entries = int(keep * n_tokens - exact) // n_chunks if n_chunks else 0
    if n_entries < 1:
        raise ValueError(
            f"keep must leave an entry for each of {n_chunks} chunks beside {exact} exact tokens, got {keep:g} of "
            f"{n_tokens:,} tokens"
        )
    return min(n_entries, CHUNK_SIZE) / CHUNK_SIZE


def chunked(model: Any, keep: float, n_tokens: int) -> ClusteredCache:
    ratio = chunked_keep_ratio(keep, n_tokens)
    return ClusteredCache.for_model(
        model, keep_ratio=ratio, chunk_size=CHUNK_SIZE, n_sink=N_SINK, n_recent=N_RECENT, method=SoftMatching()
    )


def body_ratio(keep: float, n_tokens: int) -> float:
    """Entries / tokens in the chunks of distinctive matching, so that all entries are `keep * n_tokens`."""
    size = DISTINCTIVE["chunk_size"]
    n_chunks = max(0, n_tokens - DISTINCTIVE["n_sink"] - DISTINCTIVE["n_recent"]) // size
    exact = n_tokens - n_chunks * size
    ratio = (keep * n_tokens - exact) / (n_chunks * size) if n_chunks else 0.0
    if ratio * size < 1:
        raise ValueError(
            f"keep must leave an entry for each of {n_chunks} chunks beside {exact} exact tokens, got {keep:g} of "
            f"{n_tokens:,} tokens"
        )
    return min(1.0, ratio)


def alike(method: ClusteringMethod) -> Callable[[Any, float, int], ClusteredCache]:
    """Caches by `method` with the sizes of distinctive matching, all layers alike."""

    def make(model: Any, keep: float, n_tokens: int) -> ClusteredCache:
        size = DISTINCTIVE["chunk_size"]
        ratio = int(body_ratio(keep, n_tokens) * size) / size
        return ClusteredCache.for_model(model, keep_ratio=ratio, method=method, **DISTINCTIVE)

    return make


def distinctive_layers(model: Any, keep: float, n_tokens: int) -> ClusteredCache:
    n_layers = model.config.num_hidden_layers
    if (n_layers, model.config.hidden_size) != (30, 576):
        raise ValueError(f"model must be SmolLM2-135M, whose reading layers are known, got one of {n_layers} layers")
    ratios = layer_ratios(READING_LAYERS, n_layers=n_layers, keep_ratio=body_ratio(keep, n_tokens))
    return ClusteredCache.for_model(model, keep_ratio=ratios, method=Distinctive(n_shared=4), **DISTINCTIVE)


def recall(model: Any, keep: float, n_tokens: int) -> RecallCache:
    return RecallCache.for_model(model, budget=int(keep * n_tokens))


METHODS = {
    "full": Method(lambda model, keep, n_tokens: None, "transformers' own cache", has_keep=False, stores_all=True),
    "chunked": Method(chunked, "chunked soft matching, as published", is_blind=True),
    "distinctive": Method(alike(Distinctive(n_shared=4)), "distinctive matching, all layers alike", is_blind=True),
    "distinctive-layers": Method(distinctive_layers, "distinctive matching, most for reading layers", is_blind=True),
    "recall": Method(recall, "stores all, attends to a share", stores_all=True, is_stepwise=True, is_blind=True),
}
