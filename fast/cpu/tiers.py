"""The fast tier of a recall cache in C++."""

import torch
from torch import Tensor

from ..exact.tiers import Exact, Replaced
from .compiling import call

__all__ = ["bring", "replace_clusters"]


def replace_clusters(
    taken: list[Tensor], counts: Tensor, first_row: Tensor, last_step: Tensor, step: int, n_steps: int
) -> Replaced:
    """As `kvcluster.fast.plain.tiers.replace_clusters`."""
    choices = taken[0] if len(taken) == 1 else torch.stack(taken)
    first_row, last_step = (array.clone(memory_format=torch.contiguous_format) for array in (first_row, last_step))
    sizes, numbers = torch.empty_like(first_row), first_row.new_zeros(3, dtype=torch.int64)
    arrays = choices.contiguous(), counts.contiguous(), first_row, last_step, sizes, numbers
    call("tiers", "replace", (*first_row.shape, len(taken), step, n_steps), *arrays)
    return Replaced(first_row, last_step, sizes, *numbers.tolist())


def bring(
    source: tuple[Tensor, ...],
    held: tuple[Tensor, ...],
    exact: Exact,
    first_member: Tensor,
    sizes: Tensor,
    first_row: Tensor,
    end: Tensor,
    side: torch.cuda.Stream | None,
) -> tuple[Tensor, Tensor]:
    """As `kvcluster.fast.plain.tiers.bring`."""
    first_row, end = first_row.clone(), end.clone()
    bytes_of_row = [array.shape[-1] * array.itemsize for array in held]
    shape = (*sizes.shape, source[0].shape[-2], held[0].shape[1], *bytes_of_row, *exact, torch.get_num_threads())
    call("tiers", "bring", shape, *source, *held, first_member, sizes, first_row, end)
    return first_row, end
