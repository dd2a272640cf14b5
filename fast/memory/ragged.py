"""Memory of heads that store different numbers of entries: one buffer, head after head, each with room to grow."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int32
from torch import Tensor

from ..exact.blocks import put_in
from .ordinary import on_ordinary_tensors

__all__ = ["RaggedRows", "check_rooms", "empty_rows"]


class RaggedRows(NamedTuple):
    """Keys, values and counts of all heads of a layer.

    Attributes
    ----------
    held : (..., rows, dim), (..., rows, dim_value) and (..., rows, 1), int32. A count that was never set is 1.
    rooms : rows of each head.
    """

    held: tuple[Tensor, Tensor, Tensor]
    rooms: tuple[int, ...]

    @property
    def firsts(self) -> tuple[int, ...]:
        """The first row of each head."""
        return tuple(itertools.accumulate((0, *self.rooms[:-1])))

    @property
    def nbytes(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self.held)

    def nbytes_of(self, n_entries: int) -> int:
        """Bytes of so many entries in each problem."""
        problems = self.held[0].shape[:-2].numel()
        return problems * n_entries * sum(tensor.shape[-1] * tensor.itemsize for tensor in self.held)

    def has_room(self, lengths: Sequence[int]) -> bool:
        return all(n <= room for n, room in zip(lengths, self.rooms, strict=True))

    def write(self, lengths: Sequence[int], keys: Tensor, values: Tensor) -> None:
        """Write new tokens (..., heads, tokens, dim) behind the first `lengths` rows of each head."""
        n_new, device = keys.shape[-2], keys.device
        ends = torch.tensor([first + n for first, n in zip(self.firsts, lengths, strict=True)], device=device)
        index = (ends[:, None] + torch.arange(n_new, device=device)).flatten()
        for room, new in zip(self.held[:2], (keys, values), strict=True):
            room.index_copy_(-2, index, new.flatten(-3, -2))

    def filled(self, old: "RaggedRows", parts: Sequence[tuple[int, int, int]]) -> "RaggedRows":
        """This memory after `old`'s rows have been copied in: of each head from where, how many, to where."""
        for first, old_first, (start, n, to) in zip(self.firsts, old.firsts, parts, strict=True):
            for room, rows in zip(self.held, old.held, strict=True):
                room[..., first + to : first + to + n, :] = rows[..., old_first + start : old_first + start + n, :]
        return self

    def put(self, head: int, start: int, keys: Tensor, values: Tensor, counts: Tensor | None) -> None:
        """Write entries (..., entries, dim) of one head from its row `start` on; no counts: as they are, 1."""
        first = self.firsts[head] + start
        for room, new in zip(self.held, (keys, values, counts), strict=True):
            if new is not None:
                room[..., first : first + new.shape[-2], :] = new

    def take(self, starts: Sequence[int], n: int) -> tuple[Tensor, Tensor]:
        """Keys and values of `n` rows of each head, (..., heads, n, dim): a view where heads lie evenly."""
        keys, values, _ = self.held
        heads = len(self.rooms)
        if len(set(starts)) == 1 and len(set(self.rooms)) == 1:
            span = slice(starts[0], starts[0] + n)
            return keys.unflatten(-2, (heads, -1))[..., span, :], values.unflatten(-2, (heads, -1))[..., span, :]
        firsts = [first + start for first, start in zip(self.firsts, starts, strict=True)]
        return (
            torch.stack([keys[..., first : first + n, :] for first in firsts], dim=-3),
            torch.stack([values[..., first : first + n, :] for first in firsts], dim=-3),
        )

    def in_rows(
        self,
    ) -> tuple[Float[Tensor, "batch rows dim"], Float[Tensor, "batch rows dim_value"], Int32[Tensor, "batch rows"]]:
        """Keys, values and counts with one axis for all leading ones."""
        keys, values, counts = (x.reshape(x.shape[:-2].numel(), *x.shape[-2:]) for x in self.held)
        return keys, values, counts.squeeze(-1)

    @on_ordinary_tensors
    def rectangle(
        self, lengths: Sequence[int], more: Sequence[tuple[Tensor, Tensor, Tensor]] = (), place: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Copies (..., heads, longest, .) of the first `lengths` rows of each head, behind zeros of count 0.

        `more` are keys, values and counts of each head that come behind its first `place` rows, in a wider dtype.
        """
        joined = []
        for part, rows in enumerate(self.held):
            heads = [rows[..., first : first + n, :] for first, n in zip(self.firsts, lengths, strict=True)]
            if more:
                read = [of_head[part] if part < 2 else of_head[part].unsqueeze(-1) for of_head in more]
                heads = [put_in(head, place, x, -2) for head, x in zip(heads, read, strict=True)]
                dtype = max((head.dtype for head in heads), key=lambda dtype: dtype.itemsize)
                heads = [head.to(dtype) for head in heads]
            longest = max(head.shape[-2] for head in heads)
            padded = [torch.nn.functional.pad(head, (0, 0, longest - head.shape[-2], 0)) for head in heads]
            joined.append(torch.stack(padded, dim=-3))
        return joined[0], joined[1], joined[2].squeeze(-1)

    def without_room(self, lengths: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Copies (..., entries, .) of the first `lengths` rows of each head, one behind the other."""
        ends = zip(self.firsts, lengths, strict=True)
        spans = [slice(first, first + n) for first, n in ends]
        keys, values, counts = (torch.cat([x[..., span, :] for span in spans], dim=-2) for x in self.held)
        return keys, values, counts

    def select(self, indices: Tensor) -> "RaggedRows":
        """The rows `indices` of the first axis."""
        keys, values, counts = (tensor.index_select(0, indices) for tensor in self.held)
        return RaggedRows((keys, values, counts), self.rooms)


def check_rooms(lengths: Sequence[int], rooms: Sequence[int]) -> None:
    """Refuse heads of more rows than they have memory: compiled code would read what lies behind it."""
    for head, (n, room) in enumerate(zip(lengths, rooms, strict=True)):
        if n > room:
            raise IndexError(f"head {head} of this cache should have {n} rows, but its memory has {room}")


@on_ordinary_tensors
def empty_rows(keys: Tensor, values: Tensor, rooms: tuple[int, ...], *, has_heads: bool = True) -> RaggedRows:
    """Memory for keys and values like these, (..., heads, tokens, dim), or without the axis of heads."""
    lead = keys.shape[: -3 if has_heads else -2]
    rows = sum(rooms)
    return RaggedRows(
        (
            torch.empty(*lead, rows, keys.shape[-1], dtype=keys.dtype, device=keys.device),
            torch.empty(*lead, rows, values.shape[-1], dtype=values.dtype, device=values.device),
            torch.ones(*lead, rows, 1, dtype=torch.int32, device=keys.device),
        ),
        rooms,
    )
