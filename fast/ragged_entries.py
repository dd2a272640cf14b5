"""Entries of KV heads that store different numbers of them, on torch tensors: memory and attention, before any rule."""

import copy
from typing import Any

import torch
from jaxtyping import Float, Int32, Int64
from torch import Tensor

from .arguments import check_append, check_axis_of_rows, check_query
from .backends import implementation
from .entry_cache import with_batch
from .exact.quantization import GROUP, within_range
from .memory.changes import AllOrNothing
from .memory.packed import PackedBlocks
from .memory.ragged import RaggedRows, check_rooms, empty_rows
from .memory.room import with_room
from .scalars import scale_of

__all__ = ["RaggedEntries"]


class RaggedEntries(AllOrNothing):
    """Keys, values and counts of all heads in one buffer each, head after head, and blocks of what is quantized.

    Attributes
    ----------
    lengths, exact_lengths : entries of each head, and those of them that are not quantized; from a subclass.
    """

    lengths: tuple[int, ...]
    exact_lengths: tuple[int, ...]
    whole_heads: tuple[int, ...] = ()  # a head with keep_ratio 1 is one

    def __init__(self, n_sink: int, bits: tuple[int, int] | None, least_room: int) -> None:
        self.n_sink, self.bits, self._least_room = n_sink, bits, least_room
        self._n_seen = 0
        self._rows: RaggedRows | None = None
        self._packed: PackedBlocks | None = None  # quantized entries, which come behind the sinks

    @property
    def n_seen(self) -> int:
        """Tokens appended so far."""
        return self._n_seen

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
        return 0 if self._rows is None else self._rows.nbytes_of(sum(self.exact_lengths)) + packed

    @property
    def n_numbers(self) -> int:
        """Numbers of keys and values that are held in the dtype of the cache, as all are that are not quantized."""
        if self._rows is None:
            return 0
        keys, values, _ = self._rows.held
        return keys.shape[:-2].numel() * sum(self.exact_lengths) * (keys.shape[-1] + values.shape[-1])

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Take the next tokens, then cluster what is due.

        Returns `entries` as they were just before this clustering, the new tokens last.
        """
        self.check_new(keys, values)
        seen: tuple[Tensor, Tensor, Tensor] = self._append(keys, values)
        return seen

    def _seen(self) -> tuple[Tensor, Tensor, Tensor] | None:
        return self.entries()

    def _extend(self, keys: Tensor, values: Tensor) -> None:
        n_new = keys.shape[-2]
        before = self.exact_lengths
        after = tuple(n + n_new for n in before)
        rows = self._rows
        if rows is None or not rows.has_room(after):
            new = empty_rows(keys, values, self._with_room(after))
            rows = new if rows is None else new.filled(rows, [(0, n, 0) for n in before])
        rows.write(before, keys.detach(), values.detach())
        self._rows = rows
        self._n_seen += n_new

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
        rows, lengths = self._filled_rows(), self.exact_lengths
        check_rooms(lengths, rows.rooms)
        keys, values, counts = rows.in_rows()
        scale = scale_of(scale, query)
        if self._packed is not None:
            attend = implementation("attend_packed", "auto", query, keys, values)
            others = keys, values, counts, lengths, rows.firsts
            attended: Tensor = attend(query, *others, self._packed.packed(), queries, scale)
            return attended
        attend = implementation("attend_ragged", "auto", query, keys, values)
        output: Tensor = attend(query, keys, values, counts, lengths, rows.firsts, queries, scale)
        return output

    def entries(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """Keys, values and counts of all heads in one rectangle, a copy: shorter heads begin with zeros of count 0."""
        if self._rows is None:
            return None
        if self._packed is None:
            return self._rows.rectangle(self.lengths)
        read = [self._packed.of_head(head) for head in range(len(self.lengths))]
        return self._rows.rectangle(self.exact_lengths, read, self.n_sink)

    @property
    def like(self) -> tuple[Tensor, ...] | None:
        """Tensors of the shape of keys and values of all tokens, without memory of their own; None at first."""
        if self._rows is None:
            return None
        lead = *self._rows.held[0].shape[:-2], len(self.lengths), self.n_seen
        return tuple(x.new_empty(()).expand(*lead, x.shape[-1]) for x in self._rows.held[:2])

    def _filled_rows(self) -> RaggedRows:
        """Memory after the first append."""
        assert self._rows is not None
        return self._rows

    @property
    def nbytes_reserved(self) -> int:
        """Bytes of memory held, with room to grow."""
        packed = 0 if self._packed is None else self._packed.nbytes_reserved
        return packed + (0 if self._rows is None else self._rows.nbytes)

    def _select(self, indices: Int64[Tensor, " batch"]) -> None:
        if self._rows is not None:
            check_axis_of_rows(self._rows.held[0].ndim - 2)
            self._rows = self._rows.select(indices)
        if self._packed is not None:
            self._packed = copy.copy(self._packed)
            self._packed.select(indices)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and numbers from which `restore` makes the same cache; no tensors before the first `append`.

        What `crop` would undo is not part of the state.
        """
        if self._rows is None:
            return {}, {}
        keys, values, counts = self._rows.without_room(self.exact_lengths)
        tensors = {"keys": keys, "values": values, "counts": counts.squeeze(-1)}
        blocks = {} if self._packed is None else {"blocks": self._packed.without_room()}
        return tensors | blocks, {"n_seen": self.n_seen}

    def _restore(self, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        if not tensors:
            return
        keys, values, lengths = tensors["keys"], tensors["values"], self.exact_lengths
        check_append(keys, values, None)
        stored = RaggedRows((keys, values, tensors["counts"].unsqueeze(-1)), lengths)
        new = empty_rows(keys, values, self._with_room(lengths), has_heads=False)
        self._rows = new.filled(stored, [(0, n, 0) for n in lengths])
        if "blocks" in tensors:
            self._packed = self._new_blocks(self._rows)
            pairs = zip(self.lengths, lengths, strict=True)
            self._packed.restore(tensors["blocks"], tuple((n - n_exact) // GROUP for n, n_exact in pairs))

    def _new_blocks(self, rows: RaggedRows) -> PackedBlocks:
        """Memory for quantized entries like those of `rows`."""
        assert self.bits is not None
        keys, values, _ = rows.held
        return PackedBlocks.like(keys, values, self.bits, lead=(*keys.shape[:-2], len(rows.rooms)))

    def _as_read_back(self, keys: Tensor, values: Tensor, n_last: int, n_first: int) -> tuple[Tensor, Tensor]:
        """Tokens that leave, as they are read back: the `n_first` of the last `n_last` quantized ones, then these."""
        if self._packed is None:
            self._packed = self._new_blocks(self._filled_rows())
        read = self._packed.read_back(keys, values)
        if n_first == 0:
            return read
        first = self._packed.take(n_last // GROUP, n_first // GROUP)
        joined = [torch.cat([within_range(x, y.dtype), y], dim=-2) for x, y in zip(first, read, strict=True)]
        return joined[0], joined[1]

    def _with_quantized(
        self, rows: RaggedRows, n_due: list[int], rests: list[int], n_behind: int, n_old: int, n_tail: int
    ) -> RaggedRows:
        """What is left of `rows` when entries of each head have become blocks.

        Rows are sinks, `n_due` entries of the body that do, `rests` that do not, `n_old` recent tokens that do, and
        `n_tail` that do not. Blocks of the body come before the last `n_behind` quantized entries.
        """
        keys, values, counts = rows.held
        if self._packed is None:
            self._packed = self._new_blocks(rows)
        begins = [self.n_sink + n + rest for n, rest in zip(n_due, rests, strict=True)]
        for head, (first, n, begin) in enumerate(zip(rows.firsts, n_due, begins, strict=True)):
            for start, size, behind in ((self.n_sink, n, n_behind), (begin, n_old, 0)):
                due = slice(first + start, first + start + size)
                if size:
                    of_head = keys[..., due, :], values[..., due, :], counts[..., due, 0]
                    self._packed.add(head, *of_head, behind // GROUP)
        after = tuple(self.n_sink + rest + n_tail for rest in rests)
        new = empty_rows(keys, values, self._with_room(after), has_heads=False)
        new.filled(rows, [(0, self.n_sink, 0)] * len(after))
        new.filled(rows, [(self.n_sink + n, rest, self.n_sink) for n, rest in zip(n_due, rests, strict=True)])
        return new.filled(rows, [(begin + n_old, n_tail, n - n_tail) for begin, n in zip(begins, after, strict=True)])

    def _with_room(self, lengths: tuple[int, ...]) -> tuple[int, ...]:
        """Rows of memory for each head: the same room to grow for all, as all take the same tokens."""
        room = with_room(max(lengths), least=self._least_room) - max(lengths)
        return tuple(n + room for n in lengths)
