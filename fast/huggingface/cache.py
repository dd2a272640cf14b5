"""A transformers `Cache` whose layers are clustered caches."""

from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from ..cache import ClusteredCache as LayerCache
from ..entry_attention import attend_entries, log_counts
from .hooks import ModelHooks, check_model

__all__ = ["ClusteredCache", "ClusteredLayer"]


class ClusteredCache(Cache):
    """The key-value cache of a whole model, clustered layer by layer; made by `for_model`.

    Every layer holds a `kvcluster.fast.ClusteredCache` (batch, kv_heads, entries, dim) as `layers[i].entries`.

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

    is_kvcluster = True

    def __init__(self, layers: list["ClusteredLayer"], hooks: ModelHooks) -> None:
        super().__init__(layers=layers)
        self._hooks = hooks

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
        model : a transformers model of type `llama` with `sdpa` or `eager` attention.
        keep_ratio, chunk_size, n_sink, n_recent : as in `kvcluster.reference.ClusteredCache`, for every layer.

        Raises
        ------
        ValueError : another type of model or of attention; a parameter out of range.

        Examples
        --------
        ::

            cache = ClusteredCache.for_model(model, keep_ratio=0.25)
            tokens = model.generate(**inputs, past_key_values=cache, max_new_tokens=100)
        """
        config = check_model(model)
        layers = [
            ClusteredLayer(keep_ratio=keep_ratio, chunk_size=chunk_size, n_sink=n_sink, n_recent=n_recent)
            for _ in range(config.num_hidden_layers)
        ]
        return cls(layers, ModelHooks.of(model))

    @property
    def n_seen(self) -> int:
        """Tokens appended so far."""
        return self.layers[0].entries.n_seen

    @property
    def n_stored(self) -> int:
        """Entries held per layer and KV head."""
        return self.layers[0].entries.n_stored

    @property
    def nbytes(self) -> int:
        """Bytes of the stored entries of all layers."""
        return sum(layer.entries.nbytes for layer in self.layers)

    @property
    def nbytes_reserved(self) -> int:
        """Bytes of memory that all layers hold, room to grow included."""
        return sum(layer.entries.nbytes_reserved for layer in self.layers)


class ClusteredLayer(CacheLayerMixin):
    """One layer of a `ClusteredCache`: what transformers asks of a layer, answered by `entries`."""

    is_sliding = False

    def __init__(self, *, keep_ratio: float, chunk_size: int, n_sink: int, n_recent: int) -> None:
        self.parameters: dict[str, Any] = {
            "keep_ratio": keep_ratio,
            "chunk_size": chunk_size,
            "n_sink": n_sink,
            "n_recent": n_recent,
        }
        self.is_announced = False  # by the hooks, before each call of its attention module
        self.reset()

    @property
    def keys(self) -> Tensor | None:
        return self.entries.keys

    @property
    def values(self) -> Tensor | None:
        return self.entries.values

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take the new tokens, exact as yet; return the keys and values that they attend to."""
        if not self.is_announced:
            raise RuntimeError(
                "attention would miss the log counts: use the cache with the model that it was made for by for_model"
            )
        self.is_announced = False
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.entries.extend(key_states, value_states)
        return self.entries.keys, self.entries.values

    @property
    def is_attending(self) -> bool:
        """Whether `attend` does the work: without centroids it is left to transformers, whose bits are stock's."""
        return self.has_centroids

    def attend(self, query: Tensor, *, scale: float) -> Tensor:
        """Output (batch, heads, queries, dim) of the last `queries` tokens, each attending to entries up to its own."""
        batch, heads, queries, dim = query.shape
        kv_heads = self.entries.keys.shape[1]
        rows = query.reshape(batch, kv_heads, heads // kv_heads * queries, dim)
        held = self.entries.keys, self.entries.values, self.entries.counts
        output = attend_entries(rows, *held, queries=queries, scale=scale)
        return output.reshape(batch, heads, queries, -1)

    def finish(self) -> None:
        """Cluster what has left the recent window, now that the new tokens have been attended to."""
        self.entries.cluster()

    @property
    def has_centroids(self) -> bool:
        """Whether any entry stands for more than one token."""
        return self.entries.n_stored < self.entries.n_seen

    def mask_with_log_counts(self, mask: Tensor | None, queries: int, group: int, dtype: torch.dtype) -> Tensor | None:
        """`mask` (batch, 1 or heads, queries, entries + queries) for the next `queries` tokens, log counts added."""
        if not self.has_centroids:
            return mask
        bias = torch.nn.functional.pad(log_counts(self.entries.counts), (0, queries)).to(dtype)  # (batch, kv_heads, n)
        bias = bias.repeat_interleave(group, dim=1).unsqueeze(-2)  # (batch, heads, 1, entries + queries)
        if mask is None:
            if queries > 1:
                raise RuntimeError("several new tokens need a causal mask beside a clustered cache, got none")
            return bias
        if mask.dtype == torch.bool:
            return torch.where(mask, bias, torch.finfo(dtype).min)
        return mask + bias

    def get_seq_length(self) -> int:
        return self.entries.n_seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns of the mask, and the position that its first must claim for the new tokens' columns to be right."""
        return self.entries.n_stored + query_length, self.entries.n_seen - self.entries.n_stored

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.entries = LayerCache(**self.parameters)
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> NoReturn:
        raise NotImplementedError(
            "crop: tokens that were merged cannot be taken out again (assisted decoding needs it)"
        )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self.batch_select_indices(torch.arange(len(self.entries.keys)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.is_initialized:
            self.entries.select(indices.to(self.device))
