"""What a clustering of few tokens overwrote: kept until the next ones come, so that it can be undone."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .ordinary import on_ordinary_tensors
from .packed import LastBlocks

__all__ = ["BeforeQuantizing", "Overwritten", "before_quantizing", "keep"]


@dataclass(frozen=True, eq=False)
class Overwritten:
    """Entries that were replaced. All others keep their order.

    Attributes
    ----------
    spans : chunks of each span before.
    lost : indices, ascending, of the entries that were replaced, among those before.
    replacing : indices, ascending, of the entries that replaced them, among those after.
    entries : keys, values and counts of `lost`, (..., lost, dim).
    """

    spans: tuple[int, ...]
    lost: list[int]
    replacing: list[int]
    entries: tuple[Tensor, ...]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.entries)

    def n_before(self, n_stored: int) -> int:
        """Entries before, where now there are `n_stored`."""
        return n_stored - len(self.replacing) + len(self.lost)

    def put_back(self, held: tuple[Tensor, ...], n_stored: int) -> None:
        """Make the `n_stored` entries of `held`, which has room for all, what they were before."""
        others_after = others(self.replacing, n_stored)
        others_before = others(self.lost, self.n_before(n_stored))
        for tensor, copies in zip(held, self.entries, strict=True):
            tensor[..., others_before, :] = tensor[..., others_after, :]  # a copy: it may overlap
            tensor[..., self.lost, :] = copies

    @on_ordinary_tensors
    def select(self, indices: Tensor) -> "Overwritten":
        """The same of the rows `indices` of the first axis."""
        return replace(self, entries=tuple(tensor.index_select(0, indices) for tensor in self.entries))


@dataclass(frozen=True, eq=False)
class BeforeQuantizing:
    """What a clustering changes, before it: entries that were not quantized, and recent tokens that were.

    Attributes
    ----------
    held : copies of keys, values and counts, (..., n_held, dim).
    last : blocks of the recent tokens; None before the first block.
    n_groups : groups of 32 tokens that were quantized, clustered ones included.
    spans : chunks of each span.
    """

    held: tuple[Tensor, ...]
    last: LastBlocks | None
    n_groups: int
    spans: tuple[int, ...]

    @property
    def n_held(self) -> int:
        return self.held[0].shape[-2]

    @property
    def nbytes(self) -> int:
        of_blocks = 0 if self.last is None else self.last.blocks.nbytes
        return of_blocks + sum(tensor.nbytes for tensor in self.held)

    @on_ordinary_tensors
    def select(self, indices: Tensor) -> "BeforeQuantizing":
        """The same of the rows `indices` of the first axis."""
        last = None if self.last is None else self.last.select(indices)
        return replace(self, last=last, held=tuple(tensor.index_select(0, indices) for tensor in self.held))


@on_ordinary_tensors
def before_quantizing(
    held: tuple[Tensor, ...], n_held: int, last: LastBlocks | None, n_groups: int, spans: tuple[int, ...]
) -> BeforeQuantizing:
    """With copies of the first `n_held` entries of `held`."""
    return BeforeQuantizing(tuple(tensor[..., :n_held, :].clone() for tensor in held), last, n_groups, spans)


@on_ordinary_tensors
def keep(held: tuple[Tensor, ...], spans: tuple[int, ...], lost: list[int], replacing: list[int]) -> Overwritten:
    """Copies of the entries `lost` of `held`."""
    return Overwritten(spans, lost, replacing, tuple(tensor[..., lost, :] for tensor in held))


def others(indices: list[int], size: int) -> Tensor:
    """The indices below `size` that are not among `indices`, ascending."""
    is_other = torch.ones(size, dtype=torch.bool, device="cpu")
    is_other[indices] = False
    return is_other.nonzero().squeeze(-1)
