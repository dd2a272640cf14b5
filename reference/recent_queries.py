"""A cache that remembers a few queries, for a method that asks what later tokens look at."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from .arguments import check_append, check_array, check_integer
from .entry_cache import EntryCache
from .whole_changes import whole_or_not

__all__ = ["QUERY_STEP", "CacheWithQueries", "check_chunk_queries"]

QUERY_STEP = 32  # of so many tokens behind the sinks the queries of the last are remembered


class CacheWithQueries(EntryCache):
    """An `EntryCache` that is given queries too, where its method has `needs_queries`.

    Parameters
    ----------
    method : what clusters chunks. If it needs queries, `n_recent` must be at least 32 and `whole_heads` empty.
    n_recent : last tokens that are always exact.
    whole_heads : as in `EntryCache`.

    Attributes
    ----------
    queries : (..., group, n, dim) of the tokens at positions `n_sink + 31`, `n_sink + 63` and so on, of those that
        chunks will still be matched by: tokens behind the chunk that is clustered next. None at first. They count in
        `nbytes`.

    Notes
    -----
    A chunk is matched by the queries of the first `n_recent` tokens behind it, which have always been seen when it
    leaves the recent window. So the cache does not depend on how the tokens arrived.

    Examples
    --------
    140 tokens of one KV head, whose group has two query heads: four sinks, two chunks of 32, 72 recent tokens. Each
    chunk was matched by two of the 72 behind it, so by four queries. One sampled token stands behind the next chunk.

    >>> from kvcluster.reference import Attended, ClusteredCache
    >>> cache = ClusteredCache(keep_ratio=0.25, method=Attended(), chunk_size=32, n_sink=4, n_recent=72)
    >>> rng = np.random.default_rng(0)
    >>> keys, queries = (rng.standard_normal(shape).astype(np.float32) for shape in ((140, 8), (2, 140, 8)))
    >>> _ = cache.append(keys, keys, queries)
    >>> cache.n_clustered, cache.queries.shape
    (64, (2, 1, 8))
    """

    n_sink: int
    chunk_size: int
    n_clustered: int

    def __init__(self, method: Any, n_recent: int, whole_heads: Sequence[int]) -> None:
        super().__init__(whole_heads)
        self.method, self.n_recent = method, n_recent
        self.queries: Float[np.ndarray, "*lead group n dim"] | None = None
        if self._needs_queries:
            check_integer("n_recent", n_recent, least=QUERY_STEP)
            if len(self.whole_heads):
                rule = "whole_heads must be empty with a method that needs queries: use RaggedCache and a ratio of 1"
                raise ValueError(f"{rule}, got {list(self.whole_heads)}")

    @property
    def _needs_queries(self) -> bool:
        return getattr(self.method, "needs_queries", False)

    @property
    def nbytes(self) -> int:
        return super().nbytes + (0 if self.queries is None else self.queries.nbytes)

    @whole_or_not
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
        remembered = new if self.queries is None else np.concatenate([self.queries, new], axis=-2)
        self.queries = remembered
        seen = super().append(keys, values)
        n_sampled = max(0, self.n_seen - self.n_sink) // QUERY_STEP
        n_kept = max(0, n_sampled - (self.n_clustered + self.chunk_size) // QUERY_STEP)
        self.queries = remembered[..., remembered.shape[-2] - n_kept :, :]
        return seen

    def _queries_of(self, leaving: int) -> dict[str, np.ndarray]:
        """For `Method.cluster`, the queries (..., chunks, queries, dim) that the chunks which leave are matched by.

        Where chunks have different numbers of them, the last is repeated.
        """
        if not self._needs_queries or self.queries is None:
            return {}
        *lead, group, n, dim = self.queries.shape
        ends = self.n_clustered + self.chunk_size * (1 + np.arange(leaving // self.chunk_size))[:, None]
        first, stop = ends // QUERY_STEP, (ends + self.n_recent) // QUERY_STEP  # numbers of sampled tokens
        n_forgotten = (self.n_seen - self.n_sink) // QUERY_STEP - n
        chosen = np.minimum(first + np.arange((stop - first).max()), stop - 1) - n_forgotten  # (chunks, queries)
        of_chunks = np.moveaxis(self.queries[..., chosen, :], -4, -3)  # (..., chunks, group, queries, dim)
        return {"queries": of_chunks.reshape(*lead, len(chosen), group * chosen.shape[1], dim)}


def check_no_queries(queries: object, method: object) -> None:
    """Refuse queries where the method needs none."""
    if queries is not None:
        raise ValueError(f"queries must be None with a method that needs none, got them with {method!r}")


def check_queries(queries: np.ndarray | None, keys: np.ndarray, old: np.ndarray | None) -> np.ndarray:
    """The queries (..., group, tokens, dim) of the tokens of `keys`; refuse others than fit them and the old ones."""
    if queries is None:
        raise ValueError("queries must be given with a method that needs them, got None")
    check_array("queries", queries)
    check_dtype_of_keys(queries, keys)
    *lead, tokens, dim = keys.shape
    if queries.ndim != keys.ndim + 1 or (*queries.shape[:-3], *queries.shape[-2:]) != (*lead, tokens, dim):
        raise ValueError(f"queries must be (..., group, tokens, dim) for keys {keys.shape}, got shape {queries.shape}")
    if queries.shape[-3] < 1:
        raise ValueError(f"queries must have at least one in a group, got shape {queries.shape}")
    if old is not None and queries.shape[-3] != old.shape[-3]:
        raise ValueError(f"queries must be in groups of {old.shape[-3]} as before, got groups of {queries.shape[-3]}")
    return queries


def check_dtype_of_keys(queries: np.ndarray, keys: np.ndarray) -> None:
    """Refuse queries of another dtype than keys."""
    if queries.dtype != keys.dtype:
        raise ValueError(f"queries must have the dtype of keys, {keys.dtype.name}, got {queries.dtype.name}")


def check_chunk_queries(queries: np.ndarray, keys: np.ndarray, chunk_size: int) -> None:
    """Refuse queries that are not (..., chunks, queries, dim), at least one for each whole chunk of keys."""
    check_array("queries", queries)
    check_dtype_of_keys(queries, keys)
    *lead, tokens, dim = keys.shape
    expected = (*lead, tokens // chunk_size, dim)
    if queries.ndim != keys.ndim + 1 or (*queries.shape[:-2], queries.shape[-1]) != expected:
        raise ValueError(f"queries must be (..., chunks, queries, dim) as {expected}, got shape {queries.shape}")
    if queries.shape[-2] < 1:
        raise ValueError(f"queries must be at least one for each chunk, got shape {queries.shape}")
