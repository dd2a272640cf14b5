"""The fast tier: rows of keys and values in fast memory, and which tokens are there."""

import contextlib
from collections.abc import Iterator
from dataclasses import astuple, dataclass

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from ..exact.entries import recalled_places
from .body_clusters import longer
from .ordinary import on_ordinary_tensors

__all__ = ["FastTier", "TierStatistics"]


@dataclass
class TierStatistics:
    """What the fast tier was good for; clusters are counted for each KV head of each batch row.

    Attributes
    ----------
    n_asked : clusters that steps took tokens of; n_hits : of these, those that lay in the fast tier already.
    n_evicted : clusters that left the fast tier; those that `crop` drops do not count.
    nbytes_moved : bytes of keys and values of whole clusters copied to the fast tier. Sinks and recent tokens, which
        come once each, are not counted.
    """

    n_asked: int = 0
    n_hits: int = 0
    n_evicted: int = 0
    nbytes_moved: int = 0

    def __add__(self, other: "TierStatistics") -> "TierStatistics":
        return TierStatistics(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))

    @property
    def hit_rate(self) -> float:
        """Hits among the clusters asked for; NaN before the first step."""
        return self.n_hits / self.n_asked if self.n_asked else float("nan")


class FastTier:
    """Rows of keys and values: first those of sinks and recent tokens, then whole clusters, each in one span.

    Attributes
    ----------
    held : keys and values (problems, rows, .).
    first_row : (problems, clusters), int64: where each cluster begins; -1 if it is not here.
    last_step : (problems, clusters), int64: when it was selected last.
    """

    def __init__(self, slow: tuple[Tensor, ...], device: torch.device, n_exact: int) -> None:
        problems = slow[0].shape[:-2].numel()
        self.held = tuple(torch.zeros(problems, 0, x.shape[-1], dtype=x.dtype, device=device) for x in slow)
        self.nbytes_of_token = sum(x.shape[-1] * x.itemsize for x in slow)
        self.room_for_exact = n_exact
        self.n_exact, self.n_clustered = 0, 0  # when exact rows were copied last
        self.step = 0
        self.first_row = self.last_step = torch.zeros(problems, 0, dtype=torch.int64, device=device)
        self.counts = self.first_row
        self.end = torch.zeros(problems, dtype=torch.int64, device=device)  # of the rows in use
        self.side = torch.cuda.Stream(device) if device.type == "cuda" else None

    def replace(
        self, asked: Bool[Tensor, "problems clusters"], counts: Tensor, n_steps: int, statistics: TierStatistics
    ) -> Int64[Tensor, "problems clusters"]:
        """Drop what was not selected in the last `n_steps`, this one included; sizes of what has to be copied."""
        n_new = asked.shape[1] - self.first_row.shape[1]
        absent = torch.full_like(counts[:, :n_new], -1)
        self.first_row, self.last_step = longer(self.first_row, absent), longer(self.last_step, absent)
        self.counts = counts
        self.step += 1
        self.last_step = self.last_step.masked_fill(asked, self.step)
        is_held = self.first_row >= 0
        is_leaving = is_held & (self.last_step <= self.step - n_steps)
        self.first_row = self.first_row.masked_fill(is_leaving, -1)
        statistics.n_asked += int(asked.sum())
        statistics.n_hits += int((asked & is_held).sum())
        statistics.n_evicted += int(is_leaving.sum())
        return torch.where(asked & ~is_held, counts, 0)

    def make_room(self, n_exact: int, sizes: Int64[Tensor, "problems clusters"]) -> None:
        """Make sure of rows for `n_exact` exact tokens and, behind those in use, for clusters of these sizes."""
        end, rows = self.end + sizes.sum(dim=1), self.held[0].shape[1]
        if n_exact <= self.room_for_exact <= rows and (not len(end) or int(end.max()) <= rows):
            return
        self.room_for_exact = max(n_exact, self.room_for_exact)
        sizes_here = torch.where(self.first_row >= 0, self.counts, 0)
        old, old_rows = self.held, recalled_places(self.first_row, sizes_here)
        self.end = torch.full_like(self.end, self.room_for_exact)
        new_rows = self.place(sizes_here)
        needed = 0 if not len(end) else int((sizes_here.sum(dim=1) + sizes.sum(dim=1)).max())
        if self.room_for_exact + needed > rows:  # twice that, so that rows are rarely moved
            shape = (len(end), self.room_for_exact + 2 * needed)
            self.held = tuple(zeros((*shape, array.shape[-1]), array) for array in old)
            for new, array in zip(self.held, old, strict=True):
                new[:, : self.n_exact] = array[:, : self.n_exact]
        self.copy(old, old_rows, new_rows)

    def place(self, sizes: Int64[Tensor, "problems clusters"]) -> Int64[Tensor, "problems rows"]:
        """Rows, behind those in use, for the clusters whose size here is not 0."""
        first_row = self.end.unsqueeze(1) + sizes.cumsum(dim=1) - sizes
        self.first_row = torch.where(sizes > 0, first_row, self.first_row)
        self.end = self.end + sizes.sum(dim=1)
        return recalled_places(first_row, sizes)

    def keep(self, n_clusters: int, n_exact: int) -> None:
        """Forget all but the first clusters and the first exact tokens."""
        self.first_row, self.last_step, self.counts = (
            array[:, :n_clusters] for array in (self.first_row, self.last_step, self.counts)
        )
        self.n_exact = min(self.n_exact, n_exact)

    def first_new_exact(self, n_clustered: int, n_sink: int) -> int:
        """The first row whose exact token is not here: clustering moves all recent tokens."""
        return self.n_exact if n_clustered == self.n_clustered else min(self.n_exact, n_sink)

    def copy(self, source: tuple[Tensor, ...], source_rows: Tensor, rows: Tensor) -> None:
        """Copy `source_rows` of `source` (..., rows, .) to `rows`, both (problems, copied), -1 where there is none."""
        problem = torch.arange(len(rows), device=rows.device).unsqueeze(1)
        pairs = (source_rows, source[0]), (rows, self.held[0])
        source_rows, rows = ((places + problem * x.shape[-2])[places >= 0] for places, x in pairs)
        with self.copying():
            for held, array in zip(self.held, source, strict=True):
                is_far = array.device != held.device
                shape = len(rows), array.shape[-1]
                moving = torch.empty(shape, dtype=array.dtype, device=array.device, pin_memory=is_far)
                torch.index_select(array.reshape(-1, array.shape[-1]), 0, source_rows.to(array.device), out=moving)
                held.view(-1, array.shape[-1]).index_copy_(0, rows, moving.to(held.device, non_blocking=True))

    @contextlib.contextmanager
    def copying(self) -> Iterator[None]:
        """On CUDA: a stream that waits for what was queued before, and for which what is queued later waits."""
        if self.side is None:
            yield
            return
        computing = torch.cuda.current_stream(self.side.device)
        self.side.wait_event(computing.record_event())
        with torch.cuda.stream(self.side):
            yield
        computing.wait_event(self.side.record_event())

    def select_rows(self, indices: Int64[Tensor, " rows"]) -> None:
        """Keep the problems `indices`, in their order."""
        self.held = tuple(array.index_select(0, indices) for array in self.held)
        self.first_row, self.last_step, self.counts, self.end = (
            array.index_select(0, indices) for array in (self.first_row, self.last_step, self.counts, self.end)
        )


@on_ordinary_tensors
def zeros(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Memory of zeros, in the dtype and on the device of `like`."""
    return torch.zeros(shape, dtype=like.dtype, device=like.device)
