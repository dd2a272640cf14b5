"""Memory of quantized entries: the blocks of all KV heads of a layer, head after head, with room to grow."""

import itertools

import torch
from jaxtyping import Float, Int32, UInt8
from torch import Tensor

from ..backends import implementation
from ..exact.blocks import BlockLayout, Packed, unpack
from ..exact.quantization import GROUP
from .ordinary import on_ordinary_tensors
from .room import with_room

__all__ = ["PackedBlocks"]

LEAST_ROOM = 2  # blocks, of each head


class PackedBlocks:
    """Blocks of each KV head.

    Parameters
    ----------
    layout : of a block.
    lead : leading axes of keys and values, the last of which is that of the heads; none is one head.

    Attributes
    ----------
    lengths : blocks of each head.
    """

    def __init__(self, layout: BlockLayout, lead: tuple[int, ...], device: torch.device) -> None:
        self.layout = layout
        self._axes = lead[:-1]  # all but that of the heads
        self.lengths = (0,) * (lead[-1] if lead else 1)
        self._rooms = self.lengths
        self._memory = torch.empty(*self._axes, 0, layout.nbytes, dtype=torch.uint8, device=device)

    @classmethod
    def like(cls, keys: Tensor, values: Tensor, bits: tuple[int, int], *, lead: tuple[int, ...]) -> "PackedBlocks":
        """Empty memory for entries with the features of `keys` and `values`, on their device."""
        return cls(BlockLayout(keys.shape[-1], values.shape[-1], bits), lead, keys.device)

    @property
    def n_entries(self) -> tuple[int, ...]:
        """Entries of each head."""
        return tuple(n * GROUP for n in self.lengths)

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks."""
        return self._axes_size * sum(self.lengths) * self.layout.nbytes

    @property
    def nbytes_reserved(self) -> int:
        """Bytes of memory held, with room to grow."""
        return self._memory.untyped_storage().nbytes()

    @property
    def _axes_size(self) -> int:
        return torch.Size(self._axes).numel()

    @property
    def _firsts(self) -> tuple[int, ...]:
        return tuple(itertools.accumulate((0, *self._rooms[:-1])))

    def add(self, head: int, keys: Tensor, values: Tensor, counts: Int32[Tensor, "*axes entries"]) -> None:
        """Quantize entries (*axes, entries, .) of one head, a multiple of 32, and keep them behind those it has."""
        blocks = implementation("pack_blocks", "auto", keys, values)(keys, values, counts, self.layout)
        lengths = tuple(n + blocks.shape[-2] * (h == head) for h, n in enumerate(self.lengths))
        if lengths[head] > self._rooms[head]:
            self._move(lengths)
        first = self._firsts[head] + self.lengths[head]
        self._memory[..., first : first + blocks.shape[-2], :] = blocks
        self.lengths = lengths

    @on_ordinary_tensors
    def _move(self, lengths: tuple[int, ...]) -> None:
        """To memory with room for so many blocks of each head, and more for those that need it."""
        pairs = zip(lengths, self._rooms, strict=True)
        rooms = tuple(with_room(n, LEAST_ROOM) if n > room else room for n, room in pairs)
        moved = self._memory.new_empty(*self._axes, sum(rooms), self.layout.nbytes)
        to = itertools.accumulate((0, *rooms[:-1]))
        for start, first, n in zip(to, self._firsts, self.lengths, strict=True):
            moved[..., start : start + n, :] = self._memory[..., first : first + n, :]
        self._memory, self._rooms = moved, rooms

    def truncate(self, n_entries: tuple[int, ...]) -> None:
        """Keep only so many entries of each head."""
        self.lengths = tuple(n // GROUP for n in n_entries)

    def packed(self) -> Packed:
        """For attention."""
        blocks = self._memory.reshape(self._axes_size, *self._memory.shape[-2:])
        return Packed(self.layout, blocks, self.lengths, self._firsts)

    def read(self) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values (*axes, heads, entries, .) and counts of heads with equally many entries, as read back."""
        keys, values, counts = zip(*(self.of_head(head) for head in range(len(self.lengths))), strict=True)
        return torch.stack(keys, dim=-3), torch.stack(values, dim=-3), torch.stack(counts, dim=-2)

    def of_head(self, head: int) -> tuple[Float[Tensor, "*axes entries dim"], Tensor, Int32[Tensor, "*axes entries"]]:
        """Keys, values and counts of one head, as they are read back."""
        return unpack(self._blocks_of(head), self.layout)

    def _blocks_of(self, head: int) -> UInt8[Tensor, "*axes blocks nbytes"]:
        first = self._firsts[head]
        return self._memory[..., first : first + self.lengths[head], :]

    @on_ordinary_tensors
    def select(self, indices: Tensor) -> None:
        """Keep the rows `indices` of the first axis, which is that of the heads if there is no other."""
        if not self._axes:
            heads = indices.tolist()
            self._memory = torch.cat([self._blocks_of(head) for head in heads])
            self.lengths = self._rooms = tuple(self.lengths[head] for head in heads)
            return
        self._memory = self._memory.index_select(0, indices)
        self._axes = tuple(self._memory.shape[:-2])

    def without_room(self) -> UInt8[Tensor, "*axes blocks nbytes"]:
        """A copy of all blocks, head after head."""
        return torch.cat([self._blocks_of(head) for head in range(len(self.lengths))], dim=-2)

    @on_ordinary_tensors
    def restore(self, blocks: UInt8[Tensor, "*axes blocks nbytes"], lengths: tuple[int, ...]) -> None:
        """Hold a copy of what `without_room` gave."""
        self._memory, self._rooms, self.lengths = blocks.clone(), lengths, lengths
