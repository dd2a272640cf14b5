"""A transformers `Cache` whose layers are clustered caches."""

from typing import Any

import torch
from torch import Tensor, nn

from ..cache import ClusteredCache as LayerCache
from ..entry_attention import attend_entries, log_counts
from .hooks import ModelHooks, check_model
from .layers import EntryLayer, ModelCache, layers_of_model

__all__ = ["ClusteredCache", "ClusteredLayer"]


class ClusteredCache(ModelCache):
    """The key-value cache of a whole model, clustered layer by layer; made by `for_model`.

    Every layer holds a `kvcluster.fast.ClusteredCache` (batch, kv_heads, entries, dim) as `layers[i].entries`, but for
    layers that attend to a sliding window (all those of a `mistral` that has one): they stay transformers' own.

    Notes
    -----
    A prompt given at once is attended to exactly and clustered afterwards; later tokens attend to what is stored. With
    `keep_ratio` 1 every bit is that of a stock cache.
    Positions stay those of the tokens seen. Attention to what is stored is this package's own (`attend_entries`),
    reached by forward hooks on the model that exist as long as a cache made for it does and that leave calls with other
    caches alone. Only a model that runs `eager` attention keeps it: there the log counts are an additive mask, for
    several new tokens of shape (batch, heads, new tokens, entries + new tokens) per layer.
    Batches must have no padding; beams may be reordered; `crop` (assisted decoding) is refused.
    """

    @classmethod
    def for_model(
        cls,
        model: nn.Module,
        *,
        keep_ratio: float,
        chunk_size: int = 64,
        n_sink: int = 4,
        n_recent: int = 64,
    ) -> "ClusteredCache":
        """An empty cache for `model`, to be passed as `past_key_values=` to its `generate` or `forward`.

        Parameters
        ----------
        model : a transformers model of type `llama`, `mistral`, `qwen2`, `qwen3`, `smollm3` or `gemma3_text`, with
            `sdpa` or `eager` attention.
        keep_ratio, chunk_size, n_sink, n_recent : as in `kvcluster.reference.ClusteredCache`, for every layer.

        Raises
        ------
        ValueError : another type of model or of attention; a field of its config that is not served; a parameter out
            of range.

        Examples
        --------
        ::

            cache = ClusteredCache.for_model(model, keep_ratio=0.25)
            tokens = model.generate(**inputs, past_key_values=cache, max_new_tokens=100)
        """
        parameters: dict[str, Any] = {
            "keep_ratio": keep_ratio,
            "chunk_size": chunk_size,
            "n_sink": n_sink,
            "n_recent": n_recent,
        }
        layers = layers_of_model(check_model(model), lambda _: ClusteredLayer(parameters))
        return cls(layers, ModelHooks.of(model), parameters)


class ClusteredLayer(EntryLayer):
    """One layer of a `ClusteredCache`."""

    def __init__(self, parameters: dict[str, Any]) -> None:
        self.parameters = parameters
        super().__init__()

    def reset(self) -> None:
        self.entries = LayerCache(**self.parameters)
        super().reset()

    @property
    def has_centroids(self) -> bool:
        """Whether any entry stands for more than one token."""
        return self.entries.n_stored < self.entries.n_seen

    def attends(self, queries: int) -> bool:
        """Without centroids attention is left to transformers, whose bits are stock's."""
        return self.has_centroids

    def attend(self, query: Tensor, *, scale: float) -> Tensor:
        keys, values = self.held()
        rows, counts = self.by_kv_head(query), self.entries.counts
        output = attend_entries(rows, keys, values, counts, queries=query.shape[2], scale=scale)
        return output.reshape(*query.shape[:-1], -1)

    def mask_with_log_counts(self, mask: Tensor | None, queries: int, group: int) -> Tensor | None:
        """`mask` (batch, 1, queries, entries + queries), float, for the next `queries` tokens, log counts added."""
        if not self.has_centroids:
            return mask
        bias = torch.nn.functional.pad(log_counts(self.entries.counts), (0, queries))  # (batch, kv_heads, n)
        bias = bias.repeat_interleave(group, dim=1).unsqueeze(-2)  # (batch, heads, 1, entries + queries)
        if mask is None:
            if queries > 1:
                raise RuntimeError("several new tokens need a causal mask beside a clustered cache, got none")
            return bias
        return mask + bias
