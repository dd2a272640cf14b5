"""The online cache on torch tensors."""

import time
from collections.abc import Sequence
from typing import Any

from jaxtyping import Int64
from torch import Tensor

from .arguments import check_method
from .backends import AnyBackend
from .entry_cache import UNDO_TOKENS
from .exact.quantization import GROUP
from .memory.overwritten import BeforeQuantizing, Overwritten, before_quantizing, keep
from .memory.room import LEAST_ROOM, move_to_room
from .memory.span_merging import merge_spans
from .memory.spans import SpanPlan, SpanRules
from .methods import Method
from .quantized_body import CacheWithBits
from .recent_queries import WithQueries, queries_for
from .scalars import check_integer, check_keep_ratio, entries_of_chunk
from .soft_matching import SoftMatching

__all__ = ["ClusteredCache"]


class ClusteredCache(WithQueries, CacheWithBits):
    """A key-value cache in which centroids stand for old tokens: sinks, centroids of whole chunks, recent tokens.

    Defined, with parameters, attributes and errors, by `kvcluster.reference.ClusteredCache`: the same bytes, on the
    device of what is appended. `backend` as in `choose`, for the chunks.

    Notes
    -----
    A token is appended and a chunk clustered in place, without a copy of the body; see `EntryCache` for what that
    means for who holds on to its arrays.

    For `crop`, what the clustering of the last few tokens overwrote is kept until the next ones come;
    `nbytes_reserved` counts it. `spans` are the chunks of each span of the body.
    """

    def __init__(
        self,
        *,
        keep_ratio: float,
        method: Method = SoftMatching(),
        chunk_size: int = 256,
        n_sink: int = 16,
        n_recent: int = 64,
        recent_share: float = 0.0,
        whole_heads: Sequence[int] = (),
        bits: int | tuple[int, int] = 16,
        n_exact: int | None = None,
        backend: AnyBackend = "auto",
    ) -> None:
        super().__init__(method, whole_heads, bits, chunk_size, n_recent, n_exact)
        self.keep_ratio = check_keep_ratio(keep_ratio)
        check_method(method)
        self.chunk_size = check_integer("chunk_size", chunk_size, least=1)
        entries = entries_of_chunk(self.keep_ratio, self.chunk_size)
        shared: dict[str, Any] = {"recent_share": recent_share, "is_quantized": self.bits is not None}
        rules = SpanRules(self.chunk_size, entries, n_sink, n_recent, n_exact=self.n_exact, **shared)
        self._rules, self.n_sink, self.n_recent = rules, rules.n_sink, rules.n_recent
        self._least_room = GROUP if self.n_exact is not None else min(self.chunk_size, LEAST_ROOM)
        self.method, self.recent_share, self.backend = method, rules.recent_share, backend
        self._queries = queries_for(method, self.n_sink, self.n_recent, self.chunk_size)
        self.spans: tuple[int, ...] = ()
        self._overwritten: Overwritten | BeforeQuantizing | None = None  # by the last clustering

    @property
    def n_clustered(self) -> int:
        return sum(self.spans) * self.chunk_size

    @property
    def n_body(self) -> int:
        """Entries of the body: centroids of clustered chunks."""
        return len(self.spans) * self._rules.entries

    @property
    def nbytes_reserved(self) -> int:
        """Bytes of memory held, with room to grow and with what `crop` may need."""
        return super().nbytes_reserved + (0 if self._overwritten is None else self._overwritten.nbytes)

    @property
    def n_croppable(self) -> int:
        """The most tokens that `crop` can remove now."""
        before = self._overwritten
        spans = self.spans if before is None else before.spans
        n_groups = before.n_groups if isinstance(before, BeforeQuantizing) else self._n_groups
        return self.n_seen - self._rules.least_seen(spans, self.n_seen, n_groups)

    def _extend(self, *tokens: Tensor) -> None:
        super()._extend(*tokens)
        self._overwritten = None

    def _cluster(self) -> None:
        """Cluster every whole chunk that has left the recent window, keep the budget."""
        if not self.is_due:
            return
        begun = time.perf_counter()
        leaving, n_groups = self._leaving, self._rules.n_groups(self.n_seen)
        queries = self._queries_of(leaving)
        # entries that are not quantized:  sinks | body | leaving | recent
        #                                              start     stop
        start = self.n_sink + self.n_body - self._n_body_quantized
        stop = start + leaving
        may_be_undone = max(leaving, (n_groups - self._n_groups) * GROUP) < UNDO_TOKENS + self.chunk_size
        if may_be_undone and self.bits is not None:
            self._overwritten = self._before_quantizing()
        n_behind = self._n_recent_quantized
        if self.n_exact is not None:
            self._read_back(start, leaving, n_behind)
            n_behind -= min(n_behind, leaving)
        n_recent = self._n_stored - stop
        plan = self._rules.plan(self.spans, leaving // self.chunk_size, n_recent)
        if may_be_undone and self.bits is None:
            self._overwritten = self._what_is_overwritten(plan, start, stop)
        if leaving and self._rules.entries < self.chunk_size and self._held[0].numel():
            self._compress(start, stop, queries)
        if plan.rounds:
            self.work.add(*merge_spans(self._held, plan, self.n_sink, self._rules.entries), 0.0)
        self.spans = plan.spans
        end = self.n_sink + self.n_body - (self.n_quantized - n_behind)
        if end < stop:
            for held in self._held:
                held[..., end : end + n_recent, :] = held[..., stop : stop + n_recent, :].clone()
        self._n_stored = end + n_recent
        if self.bits is not None:
            self._quantize(self.n_sink, end - self.n_sink, n_behind)
            n_old = (n_groups * GROUP - self.n_clustered - n_behind) if self.n_exact is not None else 0
            self._quantize(self.n_sink + (end - self.n_sink) % GROUP, n_old)
        if self._queries is not None and not may_be_undone:
            self._queries.forget(self.n_clustered)
        self.work.seconds += time.perf_counter() - begun
        if self._held[0].shape[-2] > self._with_room(self._n_stored + self.chunk_size):
            self._move_to_room_for(self._n_stored)

    def crop(self, n_tokens: int) -> None:
        """Remove the last `n_tokens` tokens: the cache is then, bit for bit, as if they had never come.

        Raises
        ------
        ValueError : more than `n_croppable`. The cache is then as it was.

        Notes
        -----
        Tokens can be removed if no chunk was clustered and no spans were merged because of them. An exception is the
        last `append`, if of at most `UNDO_TOKENS` tokens: its clustering is undone, then redone for the tokens that are
        left. With keep_ratio 1 a chunk is its tokens, so that only merges count.
        """
        super().crop(n_tokens)

    def _crop(self, n_tokens: int) -> None:
        n_seen = self.n_seen - n_tokens
        if self._queries is not None:
            self._queries.crop(n_tokens)
        if n_seen < self._rules.least_seen(self.spans, self.n_seen, self._n_groups):
            self._undo(self._overwritten)
        too_young = max(0, sum(self.spans) - self._rules.n_chunks(n_seen))  # chunks whose tokens are recent again
        self.spans = self.spans[: len(self.spans) - too_young]
        self.n_seen = n_seen
        self._n_stored -= n_tokens
        self._cluster()

    def _select(self, indices: Int64[Tensor, " batch"]) -> None:
        super()._select(indices)
        if self._overwritten is not None:
            self._overwritten = self._overwritten.select(indices)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and numbers from which `restore` makes the same cache; no tensors before the first `append`.

        What `crop` would undo is not part of the state.
        """
        tensors, numbers = super().state()
        return tensors, numbers | {"n_clustered": self.n_clustered, "n_body": self.n_body} if tensors else numbers

    def _restore(self, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        super()._restore(tensors, numbers)
        if tensors:
            self.spans = tuple(numbers.get("spans", [1] * (numbers["n_clustered"] // self.chunk_size)))

    @property
    def _leaving(self) -> int:
        return (self._rules.n_chunks(self.n_seen) - sum(self.spans)) * self.chunk_size

    @property
    def is_due(self) -> bool:
        """Whether there is something to cluster or to merge."""
        if self._leaving > 0 or self._rules.is_exceeded(self.n_stored):
            return True
        return self._rules.n_groups(self.n_seen) > self._n_groups

    @property
    def _n_body_quantized(self) -> int:
        """Entries of the body that are quantized."""
        return self.n_quantized - self._n_recent_quantized

    @property
    def _n_recent_quantized(self) -> int:
        """Recent tokens that are quantized."""
        return 0 if self.n_exact is None else self.n_quantized - self.n_body // GROUP * GROUP

    @property
    def _n_groups(self) -> int:
        """Groups of 32 tokens that have been quantized, clustered ones included."""
        return 0 if self.n_exact is None else (self.n_clustered + self._n_recent_quantized) // GROUP

    def _compress(self, start: int, stop: int, queries: dict[str, Any]) -> None:
        """Cluster the chunks from entry `start` to `stop`; their spans follow one another from `start`."""
        in_chunks = self.keys[..., start:stop, :], self.values[..., start:stop, :]
        compressed = self.method.compress(
            *in_chunks, chunk_size=self.chunk_size, target=self._rules.entries, backend=self.backend, **queries
        )
        n_entries = (stop - start) // self.chunk_size * self._rules.entries
        entries = compressed.keys, compressed.values, compressed.counts.unsqueeze(-1)
        for held, chunks in zip(self._held, entries, strict=True):
            held[..., start : start + n_entries, :] = chunks.reshape(*held.shape[:-2], n_entries, held.shape[-1])
        self.work.add(compressed.n_rows, compressed.n_scored_rows, 0.0)

    def _before_quantizing(self) -> BeforeQuantizing:
        """Copies of what is not quantized, and of recent tokens."""
        last = None if self._packed is None else self._packed.last(self._n_recent_quantized // GROUP)
        return before_quantizing(self._held, self._n_stored, last, self._n_groups, self.spans)

    def _what_is_overwritten(self, plan: SpanPlan, start: int, stop: int) -> Overwritten | None:
        """Copies of the spans that will be merged, and of chunks from `start` to `stop` that will be clustered."""
        size, n_old = self._rules.entries, len(self.spans)
        extents = [range(first, first + size) for first in range(self.n_sink, start, size)]
        extents += [range(first, first + self.chunk_size) for first in range(start, stop, self.chunk_size)]
        replaced = plan.merged | set(range(n_old, len(extents)) if size < self.chunk_size else ())
        if not replaced:
            return None
        lost = [entry for slot in sorted(replaced) for entry in extents[slot]]
        places = [place for place, slot in enumerate(plan.slots) if slot in replaced]
        replacing = [self.n_sink + place * size + entry for place in places for entry in range(size)]
        return keep(self._held, self.spans, lost, replacing)

    def _undo(self, overwritten: Overwritten | BeforeQuantizing) -> None:
        """Make the entries what they were before the last clustering."""
        if isinstance(overwritten, BeforeQuantizing):
            self._held, self._n_stored, self.spans = overwritten.held, overwritten.n_held, overwritten.spans
            if overwritten.last is None:
                self._packed = None
            elif self._packed is not None:
                self._packed.put_back(overwritten.last)
            self._overwritten = None
            return
        n_before = overwritten.n_before(self.n_stored)
        if n_before > self._held[0].shape[-2]:
            self._move_to_room_for(n_before)
        overwritten.put_back(self._held, self.n_stored)
        self.spans, self._n_stored, self._overwritten = overwritten.spans, n_before, None

    def _move_to_room_for(self, entries: int) -> None:
        """Move what is stored to memory with room for `entries` and some more."""
        self._held = move_to_room(self._held, self._n_stored, self._held, self._with_room(entries))
