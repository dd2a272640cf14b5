"""Room to grow: memory for more rows than there are, so that most appends move nothing."""

from collections.abc import Callable

import torch
from torch import Tensor

from .ordinary import on_ordinary_tensors

__all__ = ["LEAST_ROOM", "move_to_room", "with_room"]

LEAST_ROOM = 64  # rows to grow by, where nothing else is said
MOST_ASKED = 512  # of the rows to grow by, those that a setting may ask for: memory follows the tokens
Allocate = Callable[[tuple[int, ...], Tensor], Tensor]


def with_room(rows: int, least: int, share: int = 32) -> int:
    """Rows to hold memory for when there are `rows`: 1 / `share` more, at least the smaller of `least` and 512."""
    return rows + max(min(least, MOST_ASKED), rows // share)


def empty_like(shape: tuple[int, ...], example: Tensor) -> Tensor:
    return torch.empty(shape, dtype=example.dtype, device=example.device)


@on_ordinary_tensors
def move_to_room(
    held: tuple[Tensor, ...] | None,
    n_kept: int,
    like: tuple[Tensor, ...],
    rows: int,
    allocate: Allocate = empty_like,
) -> tuple[Tensor, ...]:
    """Memory of `rows` rows, (..., rows, dim) for the tensors `like`, with the first `n_kept` rows of `held` in it.

    All of it is allocated before anything is copied: where that fails, `held` is as it was.
    """
    rooms = tuple(allocate((*example.shape[:-2], rows, example.shape[-1]), example) for example in like)
    for room, old in zip(rooms, held or (), strict=False):
        room[..., :n_kept, :] = old[..., :n_kept, :]
    return rooms
