"""The caches that decode against each other: transformers' own, the best full one, clustered ones."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from kvcluster.fast import SoftMatching
from kvcluster.fast.huggingface import ClusteredCache
from kvcluster.fast.huggingface.entry_layer import ClusteredLayer

__all__ = ["CONTENDERS", "IN_FEW_BITS", "FullLayer", "filled", "stored_bytes"]

CHUNK_SIZE, N_SINK, N_RECENT = 64, 4, 64
IN_FEW_BITS = "0.25 in 4 bits"


class FullLayer(ClusteredLayer):
    """A full cache with our growth in place and our attention; one that keeps every token leaves that to PyTorch."""

    def attends(self, queries: int) -> bool:
        return self.cache.n_stored > queries


def default_cache(model: Any) -> Any:
    return DynamicCache(config=model.config)


def clustered_cache(keep_ratio: float, bits: int = 16) -> Callable[[Any], Any]:
    def make(model: Any) -> Any:
        parameters: dict[str, Any] = {
            "keep_ratio": keep_ratio,
            "chunk_size": CHUNK_SIZE,
            "n_sink": N_SINK,
            "n_recent": N_RECENT,
            "bits": bits,
        }
        cache = ClusteredCache.for_model(model, method=SoftMatching(), **parameters)
        if keep_ratio == 1:
            cache.layers = [FullLayer(layer.make, are_alike=True) for layer in cache.layers]
        return cache

    return make


CONTENDERS: dict[str, Callable[[Any], Any]] = {
    "transformers": default_cache,
    "full": clustered_cache(1.0),
    "clustered 0.25": clustered_cache(0.25),
    "clustered 0.2": clustered_cache(0.2),
    IN_FEW_BITS: clustered_cache(0.25, bits=4),
}


def filled(cache: Any, batch: int, n_tokens: int, model: Any) -> Any:
    """`cache` after `n_tokens` random tokens: layers have the same keys and values, each in memory of its own."""
    config = model.config
    generator = torch.Generator().manual_seed(0)
    shape = (batch, config.num_key_value_heads, n_tokens, config.head_dim)
    keys, values = (torch.randn(shape, generator=generator, dtype=model.dtype) for _ in range(2))
    if isinstance(cache, DynamicCache):
        for index in range(config.num_hidden_layers):
            cache.update(keys.clone(), values.clone(), index)
        return cache
    first, *others = cache.layers
    first.cache.extend(keys, values)
    first.cache.cluster()
    for layer in others:
        layer.cache = copy.deepcopy(first.cache)
    for layer in cache.layers:
        layer.lazy_initialization(keys, values)
    return cache


def stored_bytes(cache: Any) -> int:
    """Bytes that attention must read."""
    if not isinstance(cache, DynamicCache):
        return cache.nbytes
    tensors: list[Tensor] = [x for layer in cache.layers for x in (layer.keys, layer.values)]
    return sum(x.nbytes for x in tensors)
