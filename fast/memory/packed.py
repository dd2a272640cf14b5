"""Memory of quantized entries: the blocks of all KV heads of a layer, head after head, with room to grow."""

import itertools
from typing import NamedTuple

import torch
from jaxtyping import Float, Int32, UInt8
from torch import Tensor

from ..backends import implementation
from ..exact.blocks import BlockLayout, Packed, unpack
from ..exact.quantization import GROUP
from .ordinary import on_ordinary_tensors
from .packed_tokens import as_read_back
from .room import with_room

__all__ = ["LastBlocks", "PackedBlocks"]

LEAST_ROOM = 2  # blocks, of each head


class LastBlocks(NamedTuple):
    """How many blocks each head has, and the last of each, (*axes, heads, blocks, nbytes)."""

    lengths: tuple[int, ...]
    blocks: UInt8[Tensor, "*axes heads blocks nbytes"]

    @on_ordinary_tensors
    def select(self, indices: Tensor) -> "LastBlocks":
        """The same of the rows `indices` of the first axis, which is that of the heads if there is no other."""
        lengths = self.lengths if self.blocks.ndim > 3 else tuple(self.lengths[head] for head in indices.tolist())
        return LastBlocks(lengths, self.blocks.index_select(0, indices))


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

    def add(
        self, head: int, keys: Tensor, values: Tensor, counts: Int32[Tensor, "*axes entries"], n_behind: int = 0
    ) -> None:
        """Quantize entries (*axes, entries, .) of one head, a multiple of 32, and keep them before its last blocks.

        Before the last `n_behind` of them, that is.
        """
        blocks = implementation("pack_blocks", "auto", keys, values)(keys, values, counts, self.layout)
        lengths = tuple(n + blocks.shape[-2] * (h == head) for h, n in enumerate(self.lengths))
        if lengths[head] > self._rooms[head]:
            self._move(lengths)
        end = self._firsts[head] + lengths[head]
        start = end - n_behind - blocks.shape[-2]
        if n_behind:
            behind = self._memory[..., start : start + n_behind, :].clone()
            self._memory[..., end - n_behind : end, :] = behind
        self._memory[..., start : end - n_behind, :] = blocks
        self.lengths = lengths

    def take(self, n_last: int, n: int) -> tuple[Tensor, Tensor]:
        """Keys and values (*axes, heads, entries, .) of the first `n` of the last `n_last` blocks, which go."""
        removed = []
        for first, length in zip(self._firsts, self.lengths, strict=True):
            start, end = first + length - n_last, first + length
            removed.append(self._memory[..., start : start + n, :].clone())
            self._memory[..., start : end - n, :] = self._memory[..., start + n : end, :].clone()
        self.lengths = tuple(length - n for length in self.lengths)
        keys, values, _ = unpack(torch.stack(removed, dim=-3), self.layout)
        return keys, values

    def read_back(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (..., entries, .), a multiple of 32, as they are after quantization, in their dtypes."""
        if keys.numel() == 0:
            return keys, values
        bits = self.layout.bits
        return as_read_back(keys.mT, bits[0]).mT, as_read_back(values, bits[1])

    def last(self, n: int) -> "LastBlocks":
        """What `put_back` takes, with copies of the last `n` blocks of each head."""
        of_heads = [self._blocks_of(head) for head in range(len(self.lengths))]
        return LastBlocks(self.lengths, torch.stack([x[..., x.shape[-2] - n :, :] for x in of_heads], dim=-3))

    def put_back(self, before: "LastBlocks") -> None:
        """Be as it was when `last` gave this, if blocks but those have only been added since."""
        if any(n > room for n, room in zip(before.lengths, self._rooms, strict=True)):
            self._move(before.lengths)
        n = before.blocks.shape[-2]
        for head, (first, length) in enumerate(zip(self._firsts, before.lengths, strict=True)):
            self._memory[..., first + length - n : first + length, :] = before.blocks[..., head, :, :]
        self.lengths = before.lengths

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
