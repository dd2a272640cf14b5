"""The fast tier: rows of keys and values in fast memory, and which tokens are there."""

from dataclasses import astuple, dataclass

import torch
from jaxtyping import Int64
from torch import Tensor

from ..backends import cell
from ..exact.tiers import Exact
from .body_clusters import BodyClusters, longer
from .ordinary import on_ordinary_tensors
from .packed_tokens import PackedTokens
from .room import with_room

__all__ = ["FastTier", "TierStatistics"]

# Keys and values of exact tokens, with the body among them if it is not packed; tokens that are exact; sinks.
Slow = tuple[tuple[Tensor, ...], PackedTokens | None, int, int]


@dataclass
class TierStatistics:
    """What the fast tier was good for; clusters are counted for each KV head of each batch row.

    Attributes
    ----------
    n_asked : clusters that steps took tokens of; n_hits : of these, those that lay in the fast tier already.
    n_evicted : clusters that left the fast tier; those that `crop` drops do not count.
    nbytes_moved : bytes of keys and values of whole clusters copied to the fast tier, in few bits where they lie so.
        Sinks and recent tokens, which come once each, are not counted.
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

    def __init__(self, slow: tuple[Tensor, ...], device: torch.device, most_exact: int, backend: str) -> None:
        problems = slow[0].shape[:-2].numel()
        self.held = tuple(torch.zeros(problems, 0, x.shape[-1], dtype=x.dtype, device=device) for x in slow)
        self.nbytes_of_token = sum(x.shape[-1] * x.itemsize for x in slow)
        self.room_for_exact, self.most_exact = 0, most_exact
        self.n_exact, self.n_clustered = 0, 0  # when exact rows were copied last
        self.step = 0
        self.first_row = self.last_step = torch.zeros(problems, 0, dtype=torch.int64, device=device)
        self.counts = self.first_row
        self.end = torch.zeros(problems, dtype=torch.int64, device=device)  # of the rows in use
        self.side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.backend = backend if device.type == "cpu" else "torch"

    def step_to(
        self,
        choices: list[Tensor] | None,
        body: BodyClusters,
        slow: Slow,
        n_steps: int,
        statistics: TierStatistics,
    ) -> None:
        """Hold all that a step attends to that takes tokens of `choices`, None while there is no body."""
        held, packed, n_exact, n_sink = slow
        counts, first_member = body.counts, body.first_member
        if choices is None:
            counts = first_member = torch.zeros(len(self.end), 0, dtype=torch.int64, device=self.end.device)
            choices = [counts]
        sizes = self.replace(choices, counts, n_steps, statistics)
        self.make_room(n_exact, sizes)
        first, n_body = self.first_new_exact(body.n_tokens, n_sink), body.n_tokens
        if packed is None:
            self.bring(held, Exact(first, n_exact, n_sink, n_body), first_member, sizes)
        else:
            self.bring(held, Exact(first, n_exact, n_sink, 0), first_member, torch.zeros_like(sizes))
            places = first_member, sizes, self.first_row, self.end
            bring = cell("bring_clusters", self.backend)
            self.first_row, self.end = bring(packed.rows, self.held, *places, self.side, packed.read)
        self.n_exact, self.n_clustered = n_exact, n_body
        of_token = self.nbytes_of_token if packed is None else packed.nbytes_of_token
        statistics.nbytes_moved += int(sizes.sum()) * of_token

    def replace(
        self, taken: list[Tensor], counts: Tensor, n_steps: int, statistics: TierStatistics
    ) -> Int64[Tensor, "problems clusters"]:
        """Drop what was not selected in the last `n_steps`, this one included; sizes of what has to be copied."""
        held = self.first_row, self.last_step
        if self.first_row.shape[1] < counts.shape[1]:
            absent = torch.full_like(counts[:, self.first_row.shape[1] :], -1)
            held = longer(self.first_row, absent), longer(self.last_step, absent)
        self.counts = counts
        self.step += 1
        replaced = cell("replace_clusters", self.backend)(taken, counts, *held, self.step, n_steps)
        self.first_row, self.last_step = replaced.first_row, replaced.last_step
        statistics.n_asked += replaced.n_asked
        statistics.n_hits += replaced.n_hits
        statistics.n_evicted += replaced.n_evicted
        return replaced.sizes

    def make_room(self, n_exact: int, sizes: Int64[Tensor, "problems clusters"]) -> None:
        """Make sure of rows for `n_exact` exact tokens and, behind those in use, for clusters of these sizes."""
        end, rows = self.end + sizes.sum(dim=1), self.held[0].shape[1]
        if n_exact <= self.room_for_exact <= rows and (not len(end) or int(end.max()) <= rows):
            return
        sizes_here = torch.where(self.first_row >= 0, self.counts, 0)
        needed = 0 if not len(end) else int((sizes_here.sum(dim=1) + sizes.sum(dim=1)).max())
        room_for_exact, old = self.room_for_exact, self.held
        if n_exact > room_for_exact:
            room_for_exact = max(n_exact, min(self.most_exact, with_room(n_exact, least=self.most_exact)))
        if room_for_exact > self.room_for_exact or room_for_exact + needed > rows:
            shape = (len(end), room_for_exact + 2 * needed)  # twice that, so that rows are rarely moved
            self.held = tuple(zeros((*shape, array.shape[-1]), array) for array in old)
            for new, array in zip(self.held, old, strict=True):
                new[:, : self.n_exact] = array[:, : self.n_exact]
        self.room_for_exact = room_for_exact
        self.end = torch.full_like(self.end, room_for_exact)
        self.bring(old, Exact(0, 0, 0, 0), self.first_row, sizes_here)

    def bring(self, source: tuple[Tensor, ...], exact: Exact, first_member: Tensor, sizes: Tensor) -> None:
        """Copy exact rows, and clusters of these sizes behind the rows in use, from `source`."""
        places = first_member, sizes, self.first_row, self.end
        self.first_row, self.end = cell("bring", self.backend)(source, self.held, exact, *places, self.side)

    def keep(self, n_clusters: int, n_exact: int) -> None:
        """Forget all but the first clusters and the first exact tokens."""
        self.first_row, self.last_step, self.counts = (
            array[:, :n_clusters] for array in (self.first_row, self.last_step, self.counts)
        )
        self.n_exact = min(self.n_exact, n_exact)

    def first_new_exact(self, n_clustered: int, n_sink: int) -> int:
        """The first row whose exact token is not here: clustering moves all recent tokens."""
        return self.n_exact if n_clustered == self.n_clustered else min(self.n_exact, n_sink)

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
