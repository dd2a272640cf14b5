"""The few queries that a cache remembers for a method that asks what later tokens look at, on torch tensors."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from .arguments import check_array, dtype_name
from .memory.changes import attempt
from .memory.ordinary import on_ordinary_tensors
from .scalars import check_integer

__all__ = ["QUERY_STEP", "WithQueries", "check_chunk_queries", "check_window", "needs_queries", "queries_for"]

QUERY_STEP = 32  # as in the reference


class RecentQueries:
    """Queries of every 32nd token behind the sinks, of those that chunks will still be matched by.

    Defined by `kvcluster.reference.recent_queries.CacheWithQueries`. Those that the reference forgets after an append
    are kept until the next one, for `crop`, where it could undo the append.

    Attributes
    ----------
    n_seen : tokens whose queries have been observed.
    held : all that are kept; None at first.
    """

    def __init__(self, n_sink: int, n_recent: int, chunk_size: int) -> None:
        self.n_sink, self.n_recent, self.chunk_size = n_sink, n_recent, chunk_size
        self.n_seen = 0
        self.held: Float[Tensor, "*lead group n dim"] | None = None

    def first_needed(self, n_clustered: int) -> int:
        """Number of the first sampled token that a chunk will be matched by: behind the one that comes next."""
        return (n_clustered + self.chunk_size) // QUERY_STEP

    def n_sampled(self, n_seen: int) -> int:
        return max(0, n_seen - self.n_sink) // QUERY_STEP

    def needed(self, n_clustered: int) -> Float[Tensor, "*lead group n dim"] | None:
        """As `queries` of the reference; None at first."""
        if self.held is None:
            return None
        n = max(0, self.n_sampled(self.n_seen) - self.first_needed(n_clustered))
        return self.held[..., self.held.shape[-2] - n :, :]

    @property
    def nbytes_reserved(self) -> int:
        return 0 if self.held is None else self.held.untyped_storage().nbytes()

    @on_ordinary_tensors
    def observe(self, queries: Float[Tensor, "*lead group tokens dim"], n_clustered: int) -> None:
        """Take those of the next tokens, while so many are clustered."""
        n_new, before = queries.shape[-2], self.n_sampled(self.n_seen)
        after = self.n_sampled(self.n_seen + n_new)
        held = self.held
        if held is None or after > before:
            first = QUERY_STEP - 1 + self.n_sink - self.n_seen  # place of the first sampled token of all
            sampled = torch.arange(before, after, device=queries.device) * QUERY_STEP + first
            new = queries.detach().index_select(-2, sampled)
            if held is not None:
                n_kept = min(held.shape[-2], max(0, before - self.first_needed(n_clustered)))
                new = torch.cat([held[..., held.shape[-2] - n_kept :, :], new], dim=-2)
            held = new
        self.held, self.n_seen = held, self.n_seen + n_new

    def of_chunks(self, n_clustered: int, leaving: int) -> Float[Tensor, "*lead chunks queries dim"]:
        """What the chunks of `leaving` tokens behind the clustered ones are matched by; the last one is repeated."""
        assert self.held is not None
        *lead, group, n, dim = self.held.shape
        chunks = torch.arange(leaving // self.chunk_size, device="cpu").unsqueeze(-1)
        ends = n_clustered + self.chunk_size * (1 + chunks)
        first, stop = ends // QUERY_STEP, (ends + self.n_recent) // QUERY_STEP
        chosen = torch.minimum(first + torch.arange(int((stop - first).max()), device="cpu"), stop - 1)
        chosen = chosen - (self.n_sampled(self.n_seen) - n)  # (chunks, queries)
        of_chunks = self.held.index_select(-2, chosen.flatten().to(self.held.device))
        of_chunks = of_chunks.unflatten(-2, chosen.shape).movedim(-4, -3)  # (*lead, chunks, group, queries, dim)
        return of_chunks.reshape(*lead, len(chosen), group * chosen.shape[1], dim)

    @on_ordinary_tensors
    def forget(self, n_clustered: int) -> None:
        """Hold no more than `needed`, now that no append can be undone that clustered so many tokens."""
        needed = self.needed(n_clustered)
        self.held = None if needed is None else needed.clone()

    def crop(self, n_tokens: int) -> None:
        """Forget those of the last `n_tokens` tokens."""
        n_lost = self.n_sampled(self.n_seen) - self.n_sampled(self.n_seen - n_tokens)
        if self.held is not None:
            self.held = self.held[..., : self.held.shape[-2] - n_lost, :]
        self.n_seen -= n_tokens

    @on_ordinary_tensors
    def select(self, indices: Int64[Tensor, " batch"]) -> None:
        """Keep the rows `indices` of the first axis."""
        if self.held is not None:
            self.held = self.held.index_select(0, indices)

    @on_ordinary_tensors
    def restore(self, queries: Float[Tensor, "*lead group n dim"], n_seen: int) -> None:
        """Hold a copy of what `needed` gave after `n_seen` tokens."""
        self.held, self.n_seen = queries.clone(), n_seen


class WithQueries:
    """What makes a cache of clustered chunks one that is given queries too, where its method needs them.

    Between `extend` and `cluster` it must `observe` the queries of the new tokens.
    """

    method: Any
    n_seen: int
    _queries: RecentQueries | None

    @property
    def n_clustered(self) -> int:
        """Tokens of clustered chunks; of a subclass."""
        raise NotImplementedError

    @property
    def _leaving(self) -> int:
        """Tokens in whole chunks that have left the recent window and are not clustered yet; of a subclass."""
        raise NotImplementedError

    @property
    def queries(self) -> Float[Tensor, "*lead group n dim"] | None:
        """As in `kvcluster.reference.ClusteredCache`."""
        return None if self._queries is None else self._queries.needed(self.n_clustered)

    @property
    def nbytes(self) -> int:
        of_entries: int = super().nbytes  # type: ignore[misc]
        return of_entries + (0 if self.queries is None else self.queries.nbytes)

    @property
    def nbytes_reserved(self) -> int:
        of_entries: int = super().nbytes_reserved  # type: ignore[misc]
        return of_entries + (0 if self._queries is None else self._queries.nbytes_reserved)

    @property
    def n_numbers(self) -> int:
        of_entries: int = super().n_numbers  # type: ignore[misc]
        return of_entries + (0 if self.queries is None else self.queries.numel())

    def append(
        self,
        keys: Float[Tensor, "*lead tokens dim"],
        values: Float[Tensor, "*lead tokens dim_value"],
        queries: Float[Tensor, "*lead group tokens dim"] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Take the next tokens, and their queries where the method needs them, then cluster what is due.

        Returns keys, values and counts of all heads as they were just before this clustering, the new tokens last.
        """
        if self._queries is None:
            check_no_queries(queries, self.method)
        self.check_new(keys, values)  # type: ignore[attr-defined]
        if self._queries is not None:
            check_queries(queries, keys, self._queries.held)
        of_queries = () if queries is None else (queries,)
        seen: tuple[Tensor, Tensor, Tensor] = self._append(keys, values, *of_queries)  # type: ignore[attr-defined]
        return seen

    def _extend(self, keys: Tensor, values: Tensor, queries: Tensor | None = None) -> None:
        if queries is not None:
            self._observe(queries)
        super()._extend(keys, values)  # type: ignore[misc]

    def observe(self, queries: Any) -> None:
        """Take the queries (..., group, tokens, dim) of the tokens that come, or have come last."""
        attempt(self, "_observe", queries)

    def _observe(self, queries: Tensor) -> None:
        assert self._queries is not None
        self._queries = copy.copy(self._queries)
        self._queries.observe(queries, self.n_clustered)

    def _check_due(self) -> None:
        """Refuse to cluster tokens of which some queries were not observed."""
        if self._queries is not None and self._leaving and self._queries.n_seen != self.n_seen:
            raise RuntimeError(
                f"{self.method!r} needs the queries of all {self.n_seen} tokens, got those of {self._queries.n_seen}"
            )

    def _queries_of(self, leaving: int) -> dict[str, Any]:
        """What a method that needs queries is given for the chunks of `leaving` tokens."""
        if self._queries is None or leaving == 0:
            return {}
        return {"queries": self._queries.of_chunks(self.n_clustered, leaving)}

    def _select(self, indices: Int64[Tensor, " batch"]) -> None:
        super()._select(indices)  # type: ignore[misc]
        if self._queries is not None:
            self._queries = copy.copy(self._queries)
            self._queries.select(indices)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """As that of the entries, with the queries."""
        tensors, numbers = super().state()  # type: ignore[misc]
        return tensors if self.queries is None else {**tensors, "queries": self.queries}, numbers

    def _restore(self, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        super()._restore(tensors, numbers)  # type: ignore[misc]
        if self._queries is not None and "queries" in tensors:
            self._queries = copy.copy(self._queries)
            self._queries.restore(tensors["queries"], numbers["n_seen"])


def needs_queries(method: Any) -> bool:
    """Whether a cache with this method has to be given queries."""
    return bool(getattr(method, "needs_queries", False))


def queries_for(method: Any, n_sink: int, n_recent: int, chunk_size: int) -> RecentQueries | None:
    """What a cache remembers for a method; None for one that needs no queries."""
    return RecentQueries(n_sink, n_recent, chunk_size) if needs_queries(method) else None


def check_window(method: Any, n_recent: int, whole_heads: Sequence[int] = ()) -> None:
    """Refuse, where queries are needed, a recent window that may have no sampled token, and whole heads."""
    if not needs_queries(method):
        return
    check_integer("n_recent", n_recent, least=QUERY_STEP)
    if whole_heads:
        rule = "whole_heads must be empty with a method that needs queries: use RaggedCache and a ratio of 1"
        raise ValueError(f"{rule}, got {list(whole_heads)}")


def check_no_queries(queries: object, method: object) -> None:
    """Refuse queries where the method needs none."""
    if queries is not None:
        raise ValueError(f"queries must be None with a method that needs none, got them with {method!r}")


def check_queries(queries: Any, keys: Tensor, old: Tensor | None) -> None:
    """Refuse what is not the queries (..., group, tokens, dim) of the tokens of `keys`, or not like the old ones."""
    if queries is None:
        raise ValueError("queries must be given with a method that needs them, got None")
    check_array("queries", queries)
    check_dtype_of_keys(queries, keys)
    expected = (*keys.shape[:-2], queries.shape[-3] if queries.ndim > 2 else 0, *keys.shape[-2:])
    if tuple(queries.shape) != expected:
        shapes = f"for keys {tuple(keys.shape)}, got shape {tuple(queries.shape)}"
        raise ValueError(f"queries must be (..., group, tokens, dim) {shapes}")
    if queries.shape[-3] < 1:
        raise ValueError(f"queries must have at least one in a group, got shape {tuple(queries.shape)}")
    if old is not None and queries.shape[-3] != old.shape[-3]:
        raise ValueError(f"queries must be in groups of {old.shape[-3]} as before, got groups of {queries.shape[-3]}")


def check_dtype_of_keys(queries: Tensor, keys: Tensor) -> None:
    """Refuse queries of another dtype than keys."""
    if queries.dtype != keys.dtype:
        raise ValueError(f"queries must have the dtype of keys, {dtype_name(keys)}, got {dtype_name(queries)}")


def check_chunk_queries(queries: Tensor, keys: Tensor, chunk_size: int) -> None:
    """Refuse queries that are not (..., chunks, queries, dim), at least one for each whole chunk of keys."""
    check_array("queries", queries)
    check_dtype_of_keys(queries, keys)
    expected = (*keys.shape[:-2], keys.shape[-2] // chunk_size, keys.shape[-1])
    if queries.ndim != keys.ndim + 1 or (*queries.shape[:-2], queries.shape[-1]) != expected:
        raise ValueError(f"queries must be (..., chunks, queries, dim) as {expected}, got shape {tuple(queries.shape)}")
    if queries.shape[-2] < 1:
        raise ValueError(f"queries must be at least one for each chunk, got shape {tuple(queries.shape)}")
