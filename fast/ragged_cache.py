"""A layer whose KV heads keep shares of their own, on torch tensors: no head is padded to the length of another."""

import time
from collections.abc import Sequence
from typing import Any

from jaxtyping import Float, Int32, Int64
from torch import Tensor

from .arguments import (
    check_append,
    check_half_range,
    check_integer,
    check_keep_ratios,
    check_method,
    check_n_heads,
    check_query,
    entries_of_chunk,
)
from .backends import AnyBackend, implementation
from .entry_cache import UNDO_TOKENS, with_batch
from .exact.blocks import BlockLayout
from .exact.quantization import GROUP, check_bits_of_entries
from .memory.ordinary import on_ordinary_tensors
from .memory.packed import PackedBlocks
from .memory.ragged import RaggedRows, empty_rows
from .memory.room import with_room
from .memory.spans import SpanRules
from .memory.work import ClusteringWork
from .methods import Method, compress_heads
from .soft_matching import SoftMatching

__all__ = ["RaggedCache"]


class RaggedCache:
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

    whole_heads: tuple[int, ...] = ()  # a head with keep_ratio 1 is one

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
        backend: AnyBackend = "auto",
    ) -> None:
        self.keep_ratios = check_keep_ratios(keep_ratios)
        check_method(method)
        check_integer("chunk_size", chunk_size, least=1)
        self._targets = [entries_of_chunk(ratio, chunk_size) for ratio in self.keep_ratios]
        self.bits = check_bits_of_entries(bits, chunk_size=chunk_size)
        shared: dict[str, Any] = {"recent_share": recent_share, "is_quantized": self.bits is not None}
        self._rules = SpanRules(chunk_size, min(self._targets), n_sink, n_recent, **shared)
        self.method, self.chunk_size, self.backend = method, chunk_size, backend
        self.n_sink, self.n_recent, self.recent_share = n_sink, n_recent, recent_share
        self._n_seen = 0
        self._n_chunks = 0  # clustered
        self._rows: RaggedRows | None = None
        self._packed: PackedBlocks | None = None  # quantized entries, which come behind the sinks
        self._lost: tuple[Tensor, Tensor] | None = None  # keys and values of what the last append clustered
        self._before: tuple[RaggedRows, int] | None = None  # with bits: all rows before that, and chunks clustered
        self.work = ClusteringWork()

    @property
    def n_seen(self) -> int:
        return self._n_seen

    @property
    def n_clustered(self) -> int:
        return self._n_chunks * self.chunk_size

    @property
    def lengths(self) -> tuple[int, ...]:
        """Entries of each head."""
        return self._lengths(self.n_seen, self._n_chunks)

    def _lengths(self, n_seen: int, n_chunks: int) -> tuple[int, ...]:
        return tuple(n_seen - n_chunks * (self.chunk_size - target) for target in self._targets)

    def _quantized(self, n_chunks: int) -> tuple[int, ...]:
        """Quantized entries of each head when so many chunks are clustered: whole groups of 32."""
        return tuple(0 if self.bits is None else n_chunks * target // GROUP * GROUP for target in self._targets)

    def _lengths_of_rows(self, n_seen: int, n_chunks: int) -> tuple[int, ...]:
        """Rows of each head: entries that are not quantized."""
        pairs = zip(self._lengths(n_seen, n_chunks), self._quantized(n_chunks), strict=True)
        return tuple(n - n_quantized for n, n_quantized in pairs)

    @property
    def n_stored(self) -> int:
        """Entries of the head that has most."""
        return max(self.lengths)

    width = n_stored

    @property
    def mean_entries(self) -> float:
        """Entries per head, the mean of all heads."""
        return sum(self.lengths) / len(self.lengths)

    @property
    def is_quantized(self) -> bool:
        """Whether any entry is quantized."""
        return self._packed is not None and any(self._packed.lengths)

    @property
    def n_rows(self) -> int:
        """Size of the first leading axis; 0 at first."""
        return 0 if self._rows is None else len(self._rows.held[0])

    @property
    def keys(self) -> Float[Tensor, "*lead entries dim"] | None:
        entries = self.entries()
        return None if entries is None else entries[0]

    @property
    def values(self) -> Float[Tensor, "*lead entries dim_value"] | None:
        entries = self.entries()
        return None if entries is None else entries[1]

    @property
    def counts(self) -> Int32[Tensor, "*lead entries"] | None:
        entries = self.entries()
        return None if entries is None else entries[2]

    @property
    def nbytes(self) -> int:
        packed = 0 if self._packed is None else self._packed.nbytes
        return 0 if self._rows is None else self._rows.nbytes_of(sum(self._exact_lengths)) + packed

    @property
    def n_numbers(self) -> int:
        """Numbers of keys and values that are held in the dtype of the cache, as all are that are not quantized."""
        if self._rows is None:
            return 0
        keys, values, _ = self._rows.held
        return keys.shape[:-2].numel() * sum(self._exact_lengths) * (keys.shape[-1] + values.shape[-1])

    @property
    def nbytes_reserved(self) -> int:
        """Bytes of memory held, with room to grow and with what `crop` may need."""
        lost = sum(tensor.nbytes for tensor in self._lost or ()) + (self._before[0].nbytes if self._before else 0)
        packed = 0 if self._packed is None else self._packed.nbytes_reserved
        return lost + packed + (0 if self._rows is None else self._rows.nbytes)

    @property
    def n_croppable(self) -> int:
        """The most tokens that `crop` can remove now."""
        n_lost = 0 if self._lost is None else self._lost[0].shape[-2]
        n_chunks = self._n_chunks - n_lost // self.chunk_size if self._before is None else self._before[1]
        return self.n_seen - self._rules.least_seen((1,) * n_chunks, self.n_seen)

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Take the next tokens, then cluster what is due.

        Returns `entries` as they were just before this clustering, the new tokens last.
        """
        self.extend(keys, values)
        seen = self.entries()
        assert seen is not None
        self.cluster()
        return seen

    def extend(self, keys: Float[Tensor, "*lead tokens dim"], values: Float[Tensor, "*lead tokens dim_value"]) -> None:
        """The first half of `append`: take the next tokens, exact as yet."""
        check_append(keys, values, self.like)
        check_n_heads(self.keep_ratios, tuple(keys.shape))
        if self.bits is not None:
            check_half_range("keys", keys, "to be quantized")
            check_half_range("values", values, "to be quantized")
        n_new = keys.shape[-2]
        before, after = self._exact_lengths, self._lengths_of_rows(self.n_seen + n_new, self._n_chunks)
        rows = self._rows
        if rows is None or not rows.has_room(after):
            new = empty_rows(keys, values, self._with_room(after))
            rows = new if rows is None else new.filled(rows, [(0, n, 0) for n in before])
        rows.write(before, keys.detach(), values.detach())
        self._rows, self._lost, self._before = rows, None, None
        self._n_seen += n_new

    @property
    def is_due(self) -> bool:
        """Whether there is something to cluster."""
        return self._rules.n_chunks(self.n_seen) > self._n_chunks

    def cluster(self) -> None:
        """The second half of `append`: cluster every whole chunk that has left the recent window."""
        if not self.is_due:
            return
        begun = time.perf_counter()
        rows, lengths = self._filled_rows(), self._exact_lengths
        n_chunks = self._rules.n_chunks(self.n_seen)
        n_leaving = (n_chunks - self._n_chunks) * self.chunk_size
        n_tail = self.n_seen - self.n_sink - n_chunks * self.chunk_size  # recent tokens that stay
        starts = [n - n_tail - n_leaving for n in lengths]  # where the leaving tokens begin, in each head
        n_quantized = self._quantized(self._n_chunks)
        after = tuple(n - q for n, q in zip(self._lengths(self.n_seen, n_chunks), n_quantized, strict=True))
        leaving = rows.take(starts, n_leaving)  # (..., heads, leaving, dim)
        new = empty_rows(*leaving, self._with_room(after)).filled(rows, [(0, n, 0) for n in starts])
        new.filled(rows, [(n - n_tail, n_tail, m - n_tail) for n, m in zip(lengths, after, strict=True)])
        heads_of_target: dict[int, list[int]] = {}
        for head, target in enumerate(self._targets):
            heads_of_target.setdefault(target, []).append(head)
        for head in heads_of_target.pop(self.chunk_size, ()):
            new.put(head, starts[head], leaving[0][..., head, :, :], leaving[1][..., head, :, :], None)
        if leaving[0].numel() and heads_of_target:
            rules: dict[str, Any] = {"chunk_size": self.chunk_size, "heads_of_target": heads_of_target}
            for heads, chunks in compress_heads(self.method, *leaving, **rules, backend=self.backend):
                shape = *leaving[0].shape[:-3], len(heads), -1
                arrays: Any = chunks.keys, chunks.values, chunks.counts.unsqueeze(-1)
                of_heads = [array.reshape(*shape, array.shape[-1]) for array in arrays]
                for place, head in enumerate(heads):
                    new.put(head, starts[head], *(array[..., place, :, :] for array in of_heads))
                self.work.add(chunks.n_rows, chunks.n_scored_rows, 0.0)
        if self.bits is not None:
            self._before = (rows, self._n_chunks) if n_leaving < UNDO_TOKENS + self.chunk_size else None
            new = self._with_quantized(new, self.bits, after, n_quantized, n_chunks)
        else:
            self._lost = leaving if n_leaving < UNDO_TOKENS + self.chunk_size else None
        self._rows, self._n_chunks = new, n_chunks
        self.work.seconds += time.perf_counter() - begun

    def _with_quantized(
        self,
        rows: RaggedRows,
        bits: tuple[int, int],
        lengths: tuple[int, ...],
        n_quantized: tuple[int, ...],
        n_chunks: int,
    ) -> RaggedRows:
        """`rows`, of which there are `lengths`, without those that become blocks now that `n_chunks` are clustered."""
        keys, values, counts = rows.held
        lead = *keys.shape[:-2], len(self._targets)
        if self._packed is None:
            layout = BlockLayout(keys.shape[-1], values.shape[-1], bits)
            self._packed = PackedBlocks(layout, lead, keys.device)
        n_due = [m - n for m, n in zip(self._quantized(n_chunks), n_quantized, strict=True)]
        for head, (first, n) in enumerate(zip(rows.firsts, n_due, strict=True)):
            due = slice(first + self.n_sink, first + self.n_sink + n)
            if n:
                self._packed.add(head, keys[..., due, :], values[..., due, :], counts[..., due, 0])
        after = tuple(m - n for m, n in zip(lengths, n_due, strict=True))
        new = empty_rows(keys, values, self._with_room(after), has_heads=False)
        new.filled(rows, [(0, min(m, self.n_sink), 0) for m in after])
        tails = ((self.n_sink + n, max(0, m - self.n_sink), self.n_sink) for m, n in zip(after, n_due, strict=True))
        return new.filled(rows, list(tails))

    def crop(self, n_tokens: int) -> None:
        """Remove the last `n_tokens` tokens, as `ClusteredCache.crop` does.

        Raises
        ------
        ValueError : more than `n_croppable`. The cache is then as it was.
        """
        check_integer("n_tokens", n_tokens, least=0)
        if n_tokens > self.n_croppable:
            most = self.n_croppable
            raise ValueError(f"n_tokens must be at most {most}, older tokens are clustered for good, got {n_tokens}")
        if self._rules.n_chunks(self.n_seen - n_tokens) < self._n_chunks:
            if self._lost is not None:
                self._undo(*self._lost)
            elif self._before is not None:
                self._rows, self._n_chunks = self._before
                self._before = None
                if self._packed is not None:
                    self._packed.truncate(*self._quantized(self._n_chunks))
        self._n_seen -= n_tokens
        self._n_chunks = min(self._n_chunks, self._rules.n_chunks(self.n_seen))  # whole chunks are tokens again
        self.cluster()

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

    def attend(
        self, query: Float[Tensor, "*lead queries dim"], *, scale: float | None = None
    ) -> Float[Tensor, "*lead queries dim_value"]:
        """Clustered attention of `query` (..., queries, dim) to all stored entries."""
        like = self.like
        check_query(query, None if like is None else like[0])
        output = self.attend_rows(with_batch(query, 3), queries=1, scale=scale)
        return output.reshape(*query.shape[:-1], output.shape[-1])

    def attend_rows(
        self, query: Float[Tensor, "batch heads rows dim"], *, queries: int, scale: float | None
    ) -> Float[Tensor, "batch heads rows dim_value"]:
        """As `attend_entries`, each head to what it stores, in one call."""
        rows = self._filled_rows()
        keys, values, counts = rows.in_rows()
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        if self._packed is not None:
            attend = implementation("attend_packed", "auto", query, keys, values)
            others = keys, values, counts, self._exact_lengths, rows.firsts
            attended: Tensor = attend(query, *others, self._packed.packed(), queries, scale)
            return attended
        attend = implementation("attend_ragged", "auto", query, keys, values)
        output: Tensor = attend(query, keys, values, counts, self.lengths, rows.firsts, queries, scale)
        return output

    def entries(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """Keys, values and counts of all heads in one rectangle, a copy: shorter heads begin with zeros of count 0."""
        if self._rows is None:
            return None
        if self._packed is None:
            return self._rows.rectangle(self.lengths)
        read = [self._packed.of_head(head) for head in range(len(self._targets))]
        return self._rows.rectangle(self._exact_lengths, read, self.n_sink)

    @property
    def like(self) -> tuple[Tensor, ...] | None:
        """Tensors of the shape of keys and values of all tokens, without memory of their own; None at first."""
        if self._rows is None:
            return None
        lead = *self._rows.held[0].shape[:-2], len(self._targets), self.n_seen
        return tuple(x.new_empty(()).expand(*lead, x.shape[-1]) for x in self._rows.held[:2])

    @on_ordinary_tensors
    def select(self, indices: Int64[Tensor, " batch"]) -> None:
        """Keep the rows `indices` of the first axis, in their order; a row may be taken more than once (beams)."""
        if self._rows is None:
            return
        self._rows = self._rows.select(indices)
        if self._lost is not None:
            keys, values = self._lost
            self._lost = keys.index_select(0, indices), values.index_select(0, indices)
        if self._before is not None:
            self._before = self._before[0].select(indices), self._before[1]
        if self._packed is not None:
            self._packed.select(indices)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and numbers from which `restore` makes the same cache; no tensors before the first `append`.

        What `crop` would undo is not part of the state.
        """
        if self._rows is None:
            return {}, {}
        keys, values, counts = self._rows.without_room(self._exact_lengths)
        numbers = {"n_seen": self.n_seen, "n_clustered": self.n_clustered}
        tensors = {"keys": keys, "values": values, "counts": counts.squeeze(-1)}
        return tensors if self._packed is None else {**tensors, "blocks": self._packed.without_room()}, numbers

    def restore(self, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        """Take over copies of the `state` of a cache with the same parameters; this one must be empty."""
        if not tensors:
            return
        check_append(tensors["keys"], tensors["values"], None)
        self._n_seen, self._n_chunks = numbers["n_seen"], numbers["n_clustered"] // self.chunk_size
        keys, values, lengths = tensors["keys"], tensors["values"], self._exact_lengths
        stored = RaggedRows((keys, values, tensors["counts"].unsqueeze(-1)), lengths)
        new = empty_rows(keys, values, self._with_room(lengths), has_heads=False)
        self._rows = new.filled(stored, [(0, n, 0) for n in lengths])
        if "blocks" in tensors and self.bits is not None:
            layout = BlockLayout(keys.shape[-1], values.shape[-1], self.bits)
            self._packed = PackedBlocks(layout, (*keys.shape[:-2], len(lengths)), keys.device)
            n_blocks = tuple(n // GROUP for n in self._quantized(self._n_chunks))
            self._packed.restore(tensors["blocks"], n_blocks)

    @property
    def _exact_lengths(self) -> tuple[int, ...]:
        return self._lengths_of_rows(self.n_seen, self._n_chunks)

    def _filled_rows(self) -> RaggedRows:
        """Memory after the first append."""
        assert self._rows is not None
        return self._rows

    def _with_room(self, lengths: tuple[int, ...]) -> tuple[int, ...]:
        """Rows of memory for each head: the same room to grow for all, as all take the same tokens."""
        room = with_room(max(lengths), least=min(self.chunk_size, 64)) - max(lengths)
        return tuple(n + room for n in lengths)
