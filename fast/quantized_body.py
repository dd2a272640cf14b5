"""A cache whose old entries are quantized, on torch tensors: 32 in a row are one block of bytes."""

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float, Int64
from torch import Tensor

from .arguments import check_half_range, check_query
from .backends import implementation
from .entry_cache import EntryCache
from .exact.blocks import put_in
from .exact.quantization import GROUP, check_bits_of_entries
from .memory.ordinary import on_ordinary_tensors
from .memory.packed import PackedBlocks

__all__ = ["CacheWithBits"]


class CacheWithBits(EntryCache):
    """An `EntryCache` that knows how to quantize; which entries, and when, is the rule of a subclass.

    Defined, with parameters, attributes and errors, by `kvcluster.reference.quantized_body.CacheWithBits`.

    Parameters
    ----------
    place : where quantized entries stand among the others: behind so many.

    Notes
    -----
    Attention reads the blocks as they are: no copy of them in another dtype is made, but by plain torch. `keys`,
    `values` and `counts` are those of all other entries.
    """

    def __init__(self, whole_heads: Sequence[int], bits: int | tuple[int, int], chunk_size: int, place: int) -> None:
        super().__init__(whole_heads, least_room=min(chunk_size, 64))
        self.bits = check_bits_of_entries(bits, chunk_size=chunk_size, whole_heads=self.whole_heads)
        self._place = place
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
        return keys.view(*lead, *keys.shape[-2:]), values.view(*lead, *values.shape[-2:]), counts.view(*lead, -1)

    @property
    def nbytes(self) -> int:
        return super().nbytes + (0 if self._packed is None else self._packed.nbytes)

    @property
    def nbytes_reserved(self) -> int:
        """Bytes of memory held, with room to grow."""
        return super().nbytes_reserved + (0 if self._packed is None else self._packed.nbytes_reserved)

    def _check_new(self, keys: Tensor, values: Tensor) -> None:
        """Refuse tokens that cannot be appended, and with `bits` numbers too large to be quantized."""
        super()._check_new(keys, values)
        if self.bits is not None:
            check_half_range("keys", keys, "to be quantized")
            check_half_range("values", values, "to be quantized")

    def attend(
        self, query: Float[Tensor, "*lead queries dim"], *, scale: float | None = None
    ) -> Float[Tensor, "*lead queries dim_value"]:
        """Clustered attention of `query` (..., queries, dim) to all stored entries."""
        if self.n_quantized == 0:
            return super().attend(query, scale=scale)
        check_query(query, self.keys)
        output = self.attend_rows(in_heads(query), queries=1, scale=scale)
        return output.reshape(*query.shape[:-1], output.shape[-1])

    def attend_rows(self, query: Tensor, *, queries: int, scale: float | None) -> Tensor:
        """As `attend_entries`, to quantized and to all other entries, read where they lie."""
        if self._packed is None or self._held is None or self.n_quantized == 0:
            return super().attend_rows(query, queries=queries, scale=scale)
        keys, values, counts = map(in_heads, self._held)  # (batch, heads, room, .)
        firsts = tuple(range(0, keys.shape[1] * keys.shape[2], keys.shape[2]))
        lengths = (self._n_stored,) * len(firsts)
        keys, values, counts = (x.flatten(1, 2) for x in (keys, values, counts))
        attend = implementation("attend_packed", "auto", query, keys, values)
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        others = keys, values, counts.squeeze(-1), lengths, firsts
        output: Tensor = attend(query, *others, self._packed.packed(), queries, scale)
        return output

    def entries(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """Keys, values and counts of all entries in their order; keys and values float32 once some are quantized."""
        others, quantized = super().entries(), self.quantized
        if others is None or quantized is None:
            return others
        pairs = zip(others, quantized, (-2, -2, -1), strict=True)
        keys, values, counts = (put_in(array, self._place, read, axis) for array, read, axis in pairs)
        return keys, values, counts

    @on_ordinary_tensors
    def select(self, indices: Int64[Tensor, " batch"]) -> None:
        """Keep the rows `indices` of the first axis, in their order; a row may be taken more than once (beams)."""
        super().select(indices)
        if self._packed is not None:
            self._packed.select(indices)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """As that of `EntryCache`, with the blocks of all heads, one behind the other."""
        tensors, numbers = super().state()
        return tensors if self._packed is None else {**tensors, "blocks": self._packed.without_room()}, numbers

    def restore(self, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        """Take over copies of the `state` of a cache with the same parameters; this one must be empty."""
        super().restore(tensors, numbers)
        if "blocks" in tensors:
            self._packed = self._new_blocks()
            heads = len(self._packed.lengths)
            self._packed.restore(tensors["blocks"], (tensors["blocks"].shape[-2] // heads,) * heads)

    def _new_blocks(self) -> PackedBlocks:
        """Memory for quantized entries like those that are held."""
        assert self._held is not None
        assert self.bits is not None
        keys, values, _ = self._held
        return PackedBlocks.like(keys, values, self.bits, lead=tuple(keys.shape[:-2]))

    def _quantize(self, n: int) -> None:
        """Quantize the entries behind the sinks, as many of `n` as are whole groups of 32."""
        n_due = n // GROUP * GROUP
        if n_due == 0 or self._held is None:
            return
        if self._packed is None:
            self._packed = self._new_blocks()
        start, stop = self._place, self._place + n_due
        due = [x[..., start:stop, :] for x in self._held]
        of_heads = [x.unbind(-3) if x.ndim > 2 else (x,) for x in due]
        for head, (keys, values, counts) in enumerate(zip(*of_heads, strict=True)):
            self._packed.add(head, keys, values, counts.squeeze(-1))
        for held in self._held:
            held[..., start : self._n_stored - n_due, :] = held[..., stop : self._n_stored, :].clone()
        self._n_stored -= n_due


def in_heads(array: Tensor) -> Tensor:
    """`array` (..., heads, rows, dim) as (batch, heads, rows, dim); without leading axes it is one head."""
    lead = array.shape[:-2]
    return array.reshape(lead[:-1].numel(), lead[-1] if lead else 1, *array.shape[-2:])
