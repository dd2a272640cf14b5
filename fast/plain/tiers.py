"""The fast tier of a recall cache with torch's own operations, on any device."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..exact.entries import recalled_places
from ..exact.tiers import Exact, Replaced

__all__ = ["bring", "bring_clusters", "replace_clusters"]


def replace_clusters(
    taken: list[Tensor], counts: Tensor, first_row: Tensor, last_step: Tensor, step: int, n_steps: int
) -> Replaced:
    """Drop what was not selected in the last `n_steps` steps, this one included.

    Parameters
    ----------
    taken : tokens taken of each cluster (problems, clusters), by each choice of this step.
    counts : (problems, clusters), int64: tokens of each cluster.
    first_row, last_step : as in `Replaced`, before the step.
    """
    asked = torch.stack(taken).amax(dim=0) > 0
    last_step = last_step.masked_fill(asked, step)
    is_held = first_row >= 0
    is_leaving = is_held & (last_step <= step - n_steps)
    numbers = [int(flags.sum()) for flags in (asked, asked & is_held, is_leaving)]
    sizes = torch.where(asked & ~is_held, counts, 0)
    return Replaced(first_row.masked_fill(is_leaving, -1), last_step, sizes, *numbers)


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
    """Copy exact rows to their places and clusters behind the rows in use.

    Parameters
    ----------
    source, held : keys and values of slow memory (..., rows, .), and of the fast tier (problems, rows, .), which has
        room.
    first_member : (problems, clusters), int64: where each cluster begins in `source`, counted from behind the sinks.
    sizes : (problems, clusters), int64: tokens of the clusters that come, else 0.
    first_row, end : (problems, clusters) and (problems,), int64: where clusters begin in `held`, rows in use there.
    side : the stream that copies, on CUDA.

    Returns
    -------
    first_row, end : with the clusters that came.
    """
    problems = len(sizes)
    rows = torch.arange(exact.first, exact.end, device=sizes.device)
    slow_rows = torch.where(rows < exact.n_sink, rows, rows + exact.n_body)
    copy(source, held, slow_rows.expand(problems, -1), rows.expand(problems, -1), side)
    return bring_clusters(source, held, exact.n_sink + first_member, sizes, first_row, end, side)


def bring_clusters(
    source: tuple[Tensor, ...],
    held: tuple[Tensor, ...],
    first_member: Tensor,
    sizes: Tensor,
    first_row: Tensor,
    end: Tensor,
    side: torch.cuda.Stream | None,
    read: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]] = lambda moved: moved,
) -> tuple[Tensor, Tensor]:
    """As `bring`, of clusters alone, which begin at `first_member` of rows that `read` makes keys and values of."""
    begins = end.unsqueeze(1) + sizes.cumsum(dim=1) - sizes
    copy(source, held, recalled_places(first_member, sizes), recalled_places(begins, sizes), side, read)
    return torch.where(sizes > 0, begins, first_row), end + sizes.sum(dim=1)


def copy(
    source: tuple[Tensor, ...],
    held: tuple[Tensor, ...],
    source_rows: Tensor,
    rows: Tensor,
    side: torch.cuda.Stream | None,
    read: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]] = lambda moved: moved,
) -> None:
    """Copy `source_rows` of `source` (..., rows, .) to `rows` of `held`, both (problems, copied), -1 for none.

    What is copied is `read` on the device of `held`.
    """
    problem = torch.arange(len(rows), device=rows.device).unsqueeze(1)
    pairs = (source_rows, source[0]), (rows, held[0])
    source_rows, rows = ((places + problem * x.shape[-2])[places >= 0] for places, x in pairs)
    with copying(side):
        moved = []
        for to, array in zip(held, source, strict=True):
            is_far = array.device != to.device
            shape = len(rows), array.shape[-1]
            moving = torch.empty(shape, dtype=array.dtype, device=array.device, pin_memory=is_far)
            torch.index_select(array.reshape(-1, array.shape[-1]), 0, source_rows.to(array.device), out=moving)
            moved.append(moving.to(to.device, non_blocking=True))
        for to, array in zip(held, read(tuple(moved)), strict=True):
            to.view(-1, array.shape[-1]).index_copy_(0, rows, array)


@contextlib.contextmanager
def copying(side: torch.cuda.Stream | None) -> Iterator[None]:
    """On CUDA: a stream that waits for what was queued before, and for which what is queued later waits."""
    if side is None:
        yield
        return
    computing = torch.cuda.current_stream(side.device)
    side.wait_event(computing.record_event())
    with torch.cuda.stream(side):
        yield
    computing.wait_event(side.record_event())
