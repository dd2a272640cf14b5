"""A cache that remembers a few queries, for a method that asks what later tokens look at."""

from typing import Any

import numpy as np
from jaxtyping import Float

from .arguments import check_append, check_integer, check_no_queries, check_queries
from .entry_cache import EntryCache

__all__ = ["QUERY_STEP", "CacheWithQueries", "check_observable"]

QUERY_STEP = 32  # of so many tokens behind the sinks the queries of the last are remembered


class CacheWithQueries(EntryCache):
    """An `EntryCache` that is given queries too, where its method has `needs_queries`.

    Attributes
    ----------
    queries : (..., group, n, dim) of the tokens at positions `n_sink + 31`, `n_sink + 63` and so on, of those that
        chunks will still be matched by: tokens behind the chunk that is clustered next. None at first. They count in
        `nbytes`.

    Notes
    -----
    A chunk is matched by the queries of the first `n_recent` tokens behind it, which have always been seen when it
    leaves the recent window. So the cache does not depend on how the tokens arrived.
    """

    n_sink: int
    n_recent: int
    chunk_size: int
    n_clustered: int
    method: Any
    queries: Float[np.ndarray, "*lead group n dim"] | None = None

    @property
    def _needs_queries(self) -> bool:
        return getattr(self.method, "needs_queries", False)

    @property
    def nbytes(self) -> int:
        return super().nbytes + (0 if self.queries is None else self.queries.nbytes)

    def append(
        self,
        keys: Float[np.ndarray, "*lead tokens dim"],
        values: Float[np.ndarray, "*lead tokens dim_value"],
        queries: Float[np.ndarray, "*lead group tokens dim"] | None = None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """As `EntryCache.append`, with the queries of the same tokens where the method needs them.

        Those of a KV head are of all query heads of its group, after rotary positions, as they attend to `keys`.
        """
        if not self._needs_queries:
            check_no_queries(queries, self.method)
            return super().append(keys, values)
        check_append(keys, values, EntryCache.entries(self)[:2])
        queries = check_queries(queries, keys, self.queries)
        sampled = np.arange(self.n_seen, self.n_seen + keys.shape[-2]) - self.n_sink + 1
        new = queries[..., (sampled > 0) & (sampled % QUERY_STEP == 0), :]
        self.queries = new if self.queries is None else np.concatenate([self.queries, new], axis=-2)
        seen = super().append(keys, values)
        n_sampled = max(0, self.n_seen - self.n_sink) // QUERY_STEP
        n_kept = max(0, n_sampled - (self.n_clustered + self.chunk_size) // QUERY_STEP)
        self.queries = self.queries[..., self.queries.shape[-2] - n_kept :, :]
        return seen

    def _queries_of(self, leaving: int) -> dict[str, np.ndarray]:
        """For `Method.cluster`, the queries (..., chunks, queries, dim) that the chunks which leave are matched by.

        Where chunks have different numbers of them, the last is repeated.
        """
        if not self._needs_queries:
            return {}
        *lead, group, n, dim = self.queries.shape
        ends = self.n_clustered + self.chunk_size * (1 + np.arange(leaving // self.chunk_size))[:, None]
        first, stop = ends // QUERY_STEP, (ends + self.n_recent) // QUERY_STEP  # numbers of sampled tokens
        n_forgotten = (self.n_seen - self.n_sink) // QUERY_STEP - n
        chosen = np.minimum(first + np.arange((stop - first).max()), stop - 1) - n_forgotten  # (chunks, queries)
        of_chunks = np.moveaxis(self.queries[..., chosen, :], -4, -3)  # (..., chunks, group, queries, dim)
        return {"queries": of_chunks.reshape(*lead, len(chosen), group * chosen.shape[1], dim)}


def check_observable(method: Any, n_recent: int, whole_heads: tuple[int, ...]) -> None:
    """Refuse a recent window without a sampled token, and whole heads, where the method needs queries."""
    if getattr(method, "needs_queries", False):
        check_integer("n_recent", n_recent, least=QUERY_STEP)
        if whole_heads:
            rule = "whole_heads must be empty with a method that needs queries: use RaggedCache and a ratio of 1"
            raise ValueError(f"{rule}, got {list(whole_heads)}")
