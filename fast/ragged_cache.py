"""A layer whose KV heads keep shares of their own, on torch tensors: no head is padded to the length of another."""

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxtyping import Int64
from torch import Tensor

from .arguments import check_append, check_half_range, check_method, check_n_heads
from .backends import AnyBackend
from .entry_cache import UNDO_TOKENS
from .exact.quantization import GROUP, check_bits_of_entries, check_n_exact
from .memory.packed import LastBlocks
from .memory.ragged import RaggedRows, empty_rows
from .memory.room import LEAST_ROOM
from .memory.spans import SpanRules
from .memory.work import ClusteringWork
from .methods import Method, compress_heads
from .ragged_entries import RaggedEntries
from .recent_queries import WithQueries, check_window, queries_for
from .scalars import check_integer, check_keep_ratios, entries_of_chunk
from .soft_matching import SoftMatching

__all__ = ["RaggedCache"]


class BeforeRagged(NamedTuple):
    """A cache with bits before a clustering: rows, blocks of recent tokens, chunks and groups of tokens quantized."""

    rows: RaggedRows
    last: LastBlocks | None
    n_chunks: int
    n_groups: int

    @property
    def nbytes(self) -> int:
        return self.rows.nbytes + (0 if self.last is None else self.last.blocks.nbytes)


class RaggedCache(WithQueries, RaggedEntries):
    """A key-value cache whose head h is head h of a `ClusteredCache` with `keep_ratios[h]`.

    Defined, with parameters, attributes and errors, by `kvcluster.reference.RaggedCache`: the same bytes, on the device
    of what is appended. `backend` as in `choose`, for the chunks.

    Notes
    -----
    Keys, values and counts of all heads lie in one buffer each, head after head (`memory.ragged`), and attention reads
    them where they lie. A clustering moves what is left to new memory, so that what is not kept is really freed. For
    `crop`, the tokens that the last append clustered are kept until the next come if it was of at most `UNDO_TOKENS`;
    `nbytes_reserved` counts them.
    """

    def __init__(
        self,
        *,
        keep_ratios: Sequence[float],
        method: Method = SoftMatching(),
        chunk_size: int = 256,
        n_sink: int = 16,
        n_recent: int = 64,
        recent_share: float = 0.0,
        bits: int | tuple[int, int] = 16,
        n_exact: int | None = None,
        backend: AnyBackend = "auto",
    ) -> None:
        self.keep_ratios = check_keep_ratios(keep_ratios)
        check_window(method, n_recent)
        of_bits = check_bits_of_entries(bits, chunk_size=chunk_size)
        self.n_exact = check_n_exact(n_exact, bits=of_bits, chunk_size=chunk_size, n_recent=n_recent)
        check_method(method)
        self.chunk_size = check_integer("chunk_size", chunk_size, least=1)
        self._targets = [entries_of_chunk(ratio, self.chunk_size) for ratio in self.keep_ratios]
        shared: dict[str, Any] = {"recent_share": recent_share, "is_quantized": of_bits is not None}
        rules = SpanRules(self.chunk_size, min(self._targets), n_sink, n_recent, n_exact=self.n_exact, **shared)
        least_room = GROUP if self.n_exact is not None else min(self.chunk_size, LEAST_ROOM)
        super().__init__(rules.n_sink, of_bits, least_room)
        self._rules, self.n_recent, self.recent_share = rules, rules.n_recent, rules.recent_share
        self.method, self.backend = method, backend
        self._queries = queries_for(method, self.n_sink, self.n_recent, self.chunk_size)
        self._n_chunks = 0  # clustered
        self._n_groups = 0  # of 32 tokens that have been quantized, with `n_exact`, clustered ones included
        self._lost: tuple[Tensor, Tensor] | None = None  # keys and values of what the last append clustered
        self._before: BeforeRagged | None = None  # with bits: what it was before that
        self.work = ClusteringWork()

    @property
    def n_clustered(self) -> int:
        return self._n_chunks * self.chunk_size

    @property
    def lengths(self) -> tuple[int, ...]:  # type: ignore[override]
        """Entries of each head."""
        return self._lengths(self.n_seen, self._n_chunks)

    @property
    def exact_lengths(self) -> tuple[int, ...]:  # type: ignore[override]
        """Entries of each head that are not quantized."""
        return self._lengths_of_rows(self.n_seen, self._n_chunks, self._n_recent_quantized)

    @property
    def _n_recent_quantized(self) -> int:
        """Recent tokens that are quantized."""
        return 0 if self.n_exact is None else self._n_groups * GROUP - self.n_clustered

    def _lengths(self, n_seen: int, n_chunks: int) -> tuple[int, ...]:
        return tuple(n_seen - n_chunks * (self.chunk_size - target) for target in self._targets)

    def _quantized(self, n_chunks: int) -> tuple[int, ...]:
        """Quantized entries of each head when so many chunks are clustered: whole groups of 32."""
        return tuple(0 if self.bits is None else n_chunks * target // GROUP * GROUP for target in self._targets)

    def _lengths_of_rows(self, n_seen: int, n_chunks: int, n_recent_quantized: int) -> tuple[int, ...]:
        """Rows of each head: entries that are not quantized."""
        pairs = zip(self._lengths(n_seen, n_chunks), self._quantized(n_chunks), strict=True)
        return tuple(n - n_quantized - n_recent_quantized for n, n_quantized in pairs)

    @property
    def nbytes_reserved(self) -> int:
        """Bytes of memory held, with room to grow and with what `crop` may need."""
        lost = sum(tensor.nbytes for tensor in self._lost or ()) + (self._before.nbytes if self._before else 0)
        return super().nbytes_reserved + lost

    @property
    def n_croppable(self) -> int:
        """The most tokens that `crop` can remove now."""
        n_lost = 0 if self._lost is None else self._lost[0].shape[-2]
        n_chunks, n_groups = self._n_chunks - n_lost // self.chunk_size, self._n_groups
        if self._before is not None:
            n_chunks, n_groups = self._before.n_chunks, self._before.n_groups
        return self.n_seen - self._rules.least_seen((1,) * n_chunks, self.n_seen, n_groups)

    def _extend(self, keys: Tensor, values: Tensor, queries: Tensor | None = None) -> None:
        super()._extend(keys, values, queries)
        self._lost = self._before = None

    def check_new(self, keys: Tensor, values: Tensor) -> None:
        """Refuse tokens that cannot be appended, and with `bits` numbers too large to be quantized."""
        check_append(keys, values, self.like)
        check_n_heads(self.keep_ratios, tuple(keys.shape))
        if self.bits is not None:
            check_half_range("keys", keys, "to be quantized")
            check_half_range("values", values, "to be quantized")

    @property
    def is_due(self) -> bool:
        """Whether there is something to cluster."""
        rules = self._rules
        return rules.n_chunks(self.n_seen) > self._n_chunks or rules.n_groups(self.n_seen) > self._n_groups

    @property
    def _leaving(self) -> int:
        return (self._rules.n_chunks(self.n_seen) - self._n_chunks) * self.chunk_size

    def _cluster(self) -> None:
        """Cluster every whole chunk that has left the recent window."""
        if not self.is_due:
            return
        begun = time.perf_counter()
        n_chunks = self._rules.n_chunks(self.n_seen)
        queries = self._queries_of(self._leaving)
        rows, lengths = self._filled_rows(), self.exact_lengths
        n_groups = self._rules.n_groups(self.n_seen)
        n_leaving = self._leaving
        n_behind = self._n_recent_quantized
        n_first = min(n_leaving, n_behind)  # leaving tokens that are quantized
        n_tail = self.n_seen - self.n_sink - n_chunks * self.chunk_size - (n_behind - n_first)  # exact tokens that stay
        n_rows = n_leaving - n_first
        starts = [n - n_tail - n_rows for n in lengths]  # where the leaving tokens begin, in each head
        n_due = [m - n for m, n in zip(self._quantized(n_chunks), self._quantized(self._n_chunks), strict=True)]
        left = self._lengths_of_rows(self.n_seen, n_chunks, n_behind - n_first)
        after = tuple(n + due for n, due in zip(left, n_due, strict=True))  # before the quantization
        may_be_undone = max(n_leaving, (n_groups - self._n_groups) * GROUP) < UNDO_TOKENS + self.chunk_size
        self._before = None
        if self.bits is not None and may_be_undone:
            last = None if self._packed is None else self._packed.last(n_behind // GROUP)
            self._before = BeforeRagged(rows, last, self._n_chunks, self._n_groups)
        leaving = rows.take(starts, n_rows)  # (..., heads, leaving, dim)
        if self.n_exact is not None:
            leaving = self._as_read_back(*leaving, n_behind, n_first)
        new = empty_rows(*leaving, self._with_room(after)).filled(rows, [(0, n, 0) for n in starts])
        new.filled(rows, [(n - n_tail, n_tail, m - n_tail) for n, m in zip(lengths, after, strict=True)])
        heads_of_target: dict[int, list[int]] = {}
        for head, target in enumerate(self._targets):
            heads_of_target.setdefault(target, []).append(head)
        for head in heads_of_target.pop(self.chunk_size, ()):
            new.put(head, starts[head], leaving[0][..., head, :, :], leaving[1][..., head, :, :], None)
        if leaving[0].numel() and heads_of_target:
            rules: dict[str, Any] = {"chunk_size": self.chunk_size, "heads_of_target": heads_of_target, **queries}
            for heads, chunks in compress_heads(self.method, *leaving, backend=self.backend, **rules):
                shape = *leaving[0].shape[:-3], len(heads), -1
                arrays: Any = chunks.keys, chunks.values, chunks.counts.unsqueeze(-1)
                of_heads = [array.reshape(*shape, array.shape[-1]) for array in arrays]
                for place, head in enumerate(heads):
                    new.put(head, starts[head], *(array[..., place, :, :] for array in of_heads))
                self.work.add(chunks.n_rows, chunks.n_scored_rows, 0.0)
        if self.bits is not None:
            n_old = n_groups * GROUP - n_chunks * self.chunk_size - (n_behind - n_first) if n_groups else 0
            rests = [n - self.n_sink - n_tail for n in left]
            new = self._with_quantized(new, n_due, rests, n_behind - n_first, n_old, n_tail - n_old)
        else:
            self._lost = leaving if may_be_undone else None
        self._rows, self._n_chunks, self._n_groups = new, n_chunks, n_groups
        if self._queries is not None and not may_be_undone:
            self._queries.forget(self.n_clustered)
        self.work.seconds += time.perf_counter() - begun

    def crop(self, n_tokens: int) -> None:
        """Remove the last `n_tokens` tokens, as `ClusteredCache.crop` does.

        Raises
        ------
        ValueError : more than `n_croppable`. The cache is then as it was.
        """
        super().crop(n_tokens)

    def _crop(self, n_tokens: int) -> None:
        n_seen = self.n_seen - n_tokens
        if self._queries is not None:
            self._queries.crop(n_tokens)
        if self._rules.n_chunks(n_seen) < self._n_chunks or self._rules.n_groups(n_seen) < self._n_groups:
            if self._lost is not None:
                self._undo(*self._lost)
            elif self._before is not None:
                self._rows, last, self._n_chunks, self._n_groups = self._before
                self._before = None
                if last is None:
                    self._packed = None
                elif self._packed is not None:
                    self._packed.put_back(last)
        self._n_seen -= n_tokens
        self._n_chunks = min(self._n_chunks, self._rules.n_chunks(self.n_seen))  # whole chunks are tokens again
        self._cluster()

    def _undo(self, keys: Tensor, values: Tensor) -> None:
        """Put the tokens that were clustered last in the place of their entries again."""
        rows, lengths, n_lost = self._filled_rows(), self.lengths, keys.shape[-2]  # without bits
        n_chunks = self._n_chunks - n_lost // self.chunk_size
        before = self._lengths(self.n_seen, n_chunks)
        n_tail = self.n_seen - self.n_sink - self.n_clustered
        starts = [n - n_tail - n_lost for n in before]
        new = empty_rows(keys, values, self._with_room(before)).filled(rows, [(0, n, 0) for n in starts])
        new.filled(rows, [(m - n_tail, n_tail, n - n_tail) for n, m in zip(before, lengths, strict=True)])
        for head, start in enumerate(starts):
            new.put(head, start, keys[..., head, :, :], values[..., head, :, :], None)
        self._rows, self._n_chunks, self._lost = new, n_chunks, None

    def _select(self, indices: Int64[Tensor, " batch"]) -> None:
        super()._select(indices)
        if self._lost is not None:
            keys, values = self._lost
            self._lost = keys.index_select(0, indices), values.index_select(0, indices)
        if self._before is not None:
            rows, last, *numbers = self._before
            self._before = BeforeRagged(rows.select(indices), last and last.select(indices), *numbers)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """As that of `RaggedEntries`, with the number of clustered tokens."""
        tensors, numbers = super().state()
        return tensors, numbers | {"n_clustered": self.n_clustered} if tensors else numbers

    def _restore(self, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        if tensors:
            self._n_seen, self._n_chunks = numbers["n_seen"], numbers["n_clustered"] // self.chunk_size
            self._n_groups = self._rules.n_groups(self.n_seen)
        super()._restore(tensors, numbers)
