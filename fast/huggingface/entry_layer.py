"""One layer whose cache holds entries with counts: clustered, ragged, bounded or as published."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..entry_cache import EntryCache
from ..exact.entries import log_counts
from ..ragged_cache import RaggedCache
from .layers import EntryLayer

__all__ = ["ClusteredLayer"]

NAMES = ("keys", "values", "counts")


class ClusteredLayer(EntryLayer):
    """One layer; unless all layers are alike, transformers' one mask does not fit them all."""

    def __init__(
        self, make: Callable[[], EntryCache | RaggedCache], *, are_alike: bool, needs_queries: bool = False
    ) -> None:
        self.make, self.are_alike, self.needs_queries = make, are_alike, needs_queries
        super().__init__()

    @property
    def has_plain_mask(self) -> bool:
        """Whether new tokens may attend to what is stored by transformers' mask as it is."""
        has_whole_heads = bool(self.cache.caches[0].whole_heads) if self.cache.caches else False
        is_exact = not self.has_centroids and not any(cache.is_quantized for cache in self.cache.caches)
        return self.are_alike and is_exact and not self.cache.is_padded and not has_whole_heads

    @property
    def has_centroids(self) -> bool:
        """Whether any entry stands for more than one token."""
        return any(cache.mean_entries < cache.n_seen for cache in self.cache.caches)

    @property
    def keys(self) -> Tensor | None:
        return self.side_by_side(self.cache.width, "keys").to(self.dtype) if self.cache.n_seen else self.cache.keys

    @property
    def values(self) -> Tensor | None:
        return self.side_by_side(self.cache.width, "values").to(self.dtype) if self.cache.n_seen else self.cache.values

    def held(self) -> tuple[Tensor, Tensor]:
        """Keys and values that new tokens attend to, themselves last, of all heads."""
        keys, values = (entries_of(self.cache.caches[0], name) for name in ("keys", "values"))
        return keys.to(self.dtype), values.to(self.dtype)  # of quantized entries float32

    def attends(self, queries: int) -> bool:
        """A first call, and all calls without centroids, are left to transformers, so that their bits are stock's."""
        return not self.is_first and not self.has_plain_mask

    def observe(self, query: Tensor) -> None:
        """Let the caches of all rows see the queries, if their method needs them."""
        if self.needs_queries:
            self.cache.observe(query.unflatten(1, (self.kv_heads, -1)))  # (batch, kv_heads, group, queries, dim)

    def attend_to(self, cache: EntryCache | RaggedCache, query: Tensor, scale: float) -> Tensor:
        output = cache.attend_rows(self.by_kv_head(query), queries=query.shape[2], scale=scale)
        return output.reshape(*query.shape[:-1], -1)

    def side_by_side(self, width: int, name: str) -> Tensor:
        """Keys, values or counts of all rows and all heads, (batch, kv_heads, width, ...), the last entries last."""
        if self.cache.is_padded:
            return self.cache.side_by_side(width, name, entries_of)
        return entries_of(self.cache.caches[0], name)

    def mask_with_log_counts(self, mask: Tensor | None, queries: int, group: int) -> Tensor | None:
        """`mask` (batch, 1, queries, entries + queries), float, for the next `queries` tokens, log counts added."""
        if self.cache.n_seen == 0 or self.has_plain_mask:
            return mask
        counts = self.counts_with(queries)
        bias = log_counts(counts).repeat_interleave(group, dim=1).unsqueeze(-2)  # (batch, heads, 1, entries + queries)
        columns = counts.shape[-1]
        is_later = torch.ones(queries, columns, dtype=torch.bool, device=bias.device).triu(columns - queries + 1)
        return bias.masked_fill(is_later, -torch.inf).clamp(min=torch.finfo(bias.dtype).min)

    def counts_with(self, queries: int) -> Tensor:
        """Counts (batch, kv_heads, entries + queries) of what is stored and of the next tokens, 0 for padding."""
        stored = self.side_by_side(self.cache.width, "counts")
        if self.cache.is_padded:
            padding = torch.tensor(self.padding, device=stored.device) - self.cache.n_seen  # among the next tokens
            new = torch.arange(queries, device=stored.device) >= padding[:, None]  # (batch, queries)
        else:
            new = stored.new_ones(len(stored), queries)
        return torch.cat([stored, new[:, None].expand(-1, stored.shape[1], -1).to(stored.dtype)], dim=-1)


def entries_of(cache: EntryCache | RaggedCache, name: str) -> Tensor:
    """Keys, values or counts of all heads of a cache that holds tokens."""
    entries: Any = cache.entries()
    array: Tensor = entries[NAMES.index(name)]
    return array
