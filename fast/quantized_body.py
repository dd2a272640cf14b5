"""A cache whose old entries are quantized, on torch tensors: 32 in a row are one block of bytes."""

import copy
from collections.abc import Sequence
from typing import Any

from jaxtyping import Float, Int64
from torch import Tensor

from .arguments import check_half_range, check_query
from .backends import implementation
from .entry_cache import EntryCache
from .exact.blocks import put_in
from .exact.quantization import GROUP, check_bits_of_entries, check_n_exact, within_range
from .memory.packed import PackedBlocks
from .memory.ragged import check_rooms
from .recent_queries import check_window
from .scalars import scale_of

__all__ = ["CacheWithBits"]


class CacheWithBits(EntryCache):
    """An `EntryCache` that knows how to quantize; which entries, and when, is the rule of a subclass.

    Parameters, and the order of their checks, as in `kvcluster.reference.quantized_body.CacheWithBits`.

    Defined, with parameters, attributes and errors, by `kvcluster.reference.quantized_body.CacheWithBits`.

    Notes
    -----
    Attention reads the blocks as they are: no copy of them in another dtype is made, but by plain torch. `keys`,
    `values` and `counts` are those of all other entries.
    """

    n_sink: int

    def __init__(
        self,
        method: Any,
        whole_heads: Sequence[int],
        bits: int | tuple[int, int],
        chunk_size: int,
        n_recent: int,
        n_exact: int | None,
    ) -> None:
        super().__init__(whole_heads)
        check_window(method, n_recent, self.whole_heads)
        self.bits = check_bits_of_entries(bits, chunk_size=chunk_size, whole_heads=self.whole_heads)
        self.n_exact = check_n_exact(n_exact, bits=self.bits, chunk_size=chunk_size, n_recent=n_recent)
        self._packed: PackedBlocks | None = None

    @property
    def n_stored(self) -> int:
        return self._n_stored + self.n_quantized

    @property
    def n_quantized(self) -> int:
        """Entries of a head that are quantized."""
        return 0 if self._packed is None else self._packed.n_entries[0]

    @property
    def is_quantized(self) -> bool:
        """Whether any entry is quantized."""
        return self.n_quantized > 0

    @property
    def quantized(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """Keys, values and counts of quantized entries, as they are read back; None before the first."""
        if self._packed is None or self._held is None or self.n_quantized == 0:
            return None
        keys, values, counts = self._packed.read()
        lead = self._held[0].shape[:-2]
        return (
            keys.view(*lead, *keys.shape[-2:]),
            values.view(*lead, *values.shape[-2:]),
            counts.view(*lead, counts.shape[-1]),
        )

    @property
    def nbytes(self) -> int:
        return super().nbytes + (0 if self._packed is None else self._packed.nbytes)

    @property
    def nbytes_reserved(self) -> int:
        """Bytes of memory held, with room to grow."""
        return super().nbytes_reserved + (0 if self._packed is None else self._packed.nbytes_reserved)

    def check_new(self, keys: Tensor, values: Tensor) -> None:
        """Refuse tokens that cannot be appended, and with `bits` numbers too large to be quantized."""
        super().check_new(keys, values)
        if self.bits is not None:
            check_half_range("keys", keys, "to be quantized")
            check_half_range("values", values, "to be quantized")

    def attend(
        self, query: Float[Tensor, "*lead queries dim"], *, scale: float | None = None
    ) -> Float[Tensor, "*lead queries dim_value"]:
        """Clustered attention of `query` (..., queries, dim) to all stored entries."""
        if self.n_quantized == 0:
            return super().attend(query, scale=scale)
        like = self.like
        check_query(query, None if like is None else like[0])
        output = self.attend_rows(in_heads(query), queries=1, scale=scale)
        return output.reshape(*query.shape[:-1], output.shape[-1])

    def attend_rows(self, query: Tensor, *, queries: int, scale: float | None) -> Tensor:
        """As `attend_entries`, to quantized and to all other entries, read where they lie."""
        if self._packed is None or self._held is None or self.n_quantized == 0 or query.numel() == 0:
            return super().attend_rows(query, queries=queries, scale=scale)
        keys, values, counts = map(in_heads, self._held)  # (batch, heads, room, .)
        firsts = tuple(range(0, keys.shape[1] * keys.shape[2], keys.shape[2]))
        lengths = (self._n_stored,) * len(firsts)
        check_rooms(lengths, (keys.shape[2],) * len(firsts))
        keys, values, counts = (x.flatten(1, 2) for x in (keys, values, counts))
        attend = implementation("attend_packed", "auto", query, keys, values)
        others = keys, values, counts.squeeze(-1), lengths, firsts
        output: Tensor = attend(query, *others, self._packed.packed(), queries, scale_of(scale, query))
        return output

    def entries(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """Keys, values and counts of all entries in their order; keys and values float32 once some are quantized."""
        others, quantized = super().entries(), self.quantized
        if others is None or quantized is None:
            return others
        pairs = zip(others, quantized, (-2, -2, -1), strict=True)
        keys, values, counts = (put_in(array, self.n_sink, read, axis) for array, read, axis in pairs)
        return keys, values, counts

    def _select(self, indices: Int64[Tensor, " batch"]) -> None:
        super()._select(indices)
        if self._packed is not None:
            self._packed = copy.copy(self._packed)
            self._packed.select(indices)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """As that of `EntryCache`, with the blocks of all heads, one behind the other."""
        tensors, numbers = super().state()
        return tensors if self._packed is None else {**tensors, "blocks": self._packed.without_room()}, numbers

    def _restore(self, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        super()._restore(tensors, numbers)
        if "blocks" in tensors:
            self._packed = self._new_blocks()
            heads = len(self._packed.lengths)
            self._packed.restore(tensors["blocks"], (tensors["blocks"].shape[-2] // heads,) * heads)

    def _new_blocks(self) -> PackedBlocks:
        """Memory for quantized entries like those that are held."""
        assert self._held is not None
        assert self.bits is not None
        keys, values, _ = self._held
        lead = tuple(keys.shape[:-2])
        # Without KV heads: one of no rows, so that there is always a head whose entries can be counted.
        return PackedBlocks.like(keys, values, self.bits, lead=(*lead, 1) if 0 in lead[-1:] else lead)

    def _quantize(self, start: int, n: int, n_behind: int = 0) -> None:
        """Quantize the entries from `start` on, as many of `n` as are whole groups of 32.

        They come before the last `n_behind` quantized entries.
        """
        n_due = n // GROUP * GROUP
        if n_due <= 0 or self._held is None:
            return
        if self._packed is None:
            self._packed = self._new_blocks()
        stop = start + n_due
        due = [x[..., start:stop, :] for x in self._held]
        of_heads = [x.unbind(-3) if x.ndim > 2 and x.shape[-3] else (x,) for x in due]
        for head, (keys, values, counts) in enumerate(zip(*of_heads, strict=True)):
            self._packed.add(head, keys, values, counts.squeeze(-1), n_behind // GROUP)
        for held in self._held:
            held[..., start : self._n_stored - n_due, :] = held[..., stop : self._n_stored, :].clone()
        self._n_stored -= n_due

    def _read_back(self, start: int, n: int, n_quantized: int) -> None:
        """Make the next `n` tokens, the `n_quantized` last quantized entries first, entries from `start` on.

        They are rounded to few bits and read back; those that were quantized are no more.
        """
        if n == 0 or self._held is None:
            return
        if self._packed is None:
            self._packed = self._new_blocks()
        n_first = min(n, n_quantized)
        keys, values, _ = (x[..., start : start + n - n_first, :] for x in self._held)
        for held, read in zip((keys, values), self._packed.read_back(keys, values), strict=True):
            held.copy_(read)
        if n_first == 0:
            return
        stop = self._n_stored + n_first
        self._held = self._with_rows(self._held, self._n_stored, stop, self._held)
        keys, values = (
            within_range(read, held.dtype).view(*held.shape[:-2], n_first, held.shape[-1])
            for read, held in zip(
                self._packed.take(n_quantized // GROUP, n_first // GROUP), self._held[:2], strict=True
            )
        )
        ones = self._held[2].new_ones(*keys.shape[:-1], 1)
        for held, read in zip(self._held, (keys, values, ones), strict=True):
            held[..., start + n_first : stop, :] = held[..., start : self._n_stored, :].clone()
            held[..., start : start + n_first, :] = read
        self._n_stored = stop


def in_heads(array: Tensor) -> Tensor:
    """`array` (..., heads, rows, dim) as (batch, heads, rows, dim); without leading axes it is one head."""
    lead = array.shape[:-2]
    return array.reshape(lead[:-1].numel(), lead[-1] if lead else 1, *array.shape[-2:])
