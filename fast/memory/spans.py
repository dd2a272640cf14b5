"""The body of a clustered cache as a list of spans: when chunks become spans and which neighbours merge. Integers only.

A span is what a chunk became, or two spans that were merged; a list of spans is written as the chunks of each, oldest
first. It follows from the number of tokens seen. Defined by `kvcluster.reference.BoundedCache`, token by token.
"""

import bisect
import functools
import math
import operator
import sys
from dataclasses import dataclass

from ..exact.quantization import GROUP
from ..scalars import check_integer, check_recent_share

__all__ = ["SpanPlan", "SpanRules"]


@dataclass(frozen=True)
class SpanPlan:
    """Which spans are merged. A slot is a span's place in the list of the old spans and, after them, the new chunks.

    Attributes
    ----------
    spans : chunks of each span afterwards.
    slots : slot of the oldest part of each of these spans: its entries are there when all merges are done.
    rounds : merges that are done together, as the slots of the older and of the younger spans. The result takes the
        slot of the older one. A round merges what the rounds before it have left.
    """

    spans: tuple[int, ...]
    slots: tuple[int, ...]
    rounds: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]

    @property
    def n_slots(self) -> int:
        """Spans before all merges."""
        return len(self.spans) + sum(len(older) for older, _ in self.rounds)

    @property
    def merged(self) -> set[int]:
        """All slots that take part in a merge."""
        return {slot for older, younger in self.rounds for slot in (*older, *younger)}


@dataclass(frozen=True)
class SpanRules:
    """Parameters as in `ClusteredCache` and `BoundedCache`; `entries` of a span.

    Raises
    ------
    ValueError : a budget that could not hold all sinks and recent tokens, and one span.
    """

    chunk_size: int
    entries: int
    n_sink: int
    n_recent: int
    budget: int | None = None
    recent_share: float = 0.0
    is_quantized: bool = False  # whether a chunk is more than its tokens even if it has as many entries
    n_exact: int | None = None  # last tokens that are not quantized; None: recent tokens are not

    def __post_init__(self) -> None:
        object.__setattr__(self, "n_sink", check_integer("n_sink", self.n_sink, least=0))
        object.__setattr__(self, "n_recent", check_integer("n_recent", self.n_recent, least=0))
        object.__setattr__(self, "recent_share", check_recent_share(self.recent_share))
        if self.budget is None:
            return
        object.__setattr__(self, "budget", check_integer("budget", self.budget, least=1))
        least = self.n_sink + self.n_recent + self.chunk_size - 1 + self.entries
        if self.budget < least:
            raise ValueError(
                "budget must be at least n_sink + n_recent + chunk_size - 1 + ceil(keep_ratio * chunk_size), got "
                f"{self.budget} < {self.n_sink} + {self.n_recent} + {self.chunk_size} - 1 + {self.entries} = {least}"
            )

    def plan(self, spans: tuple[int, ...], n_new: int, recent: int) -> SpanPlan:
        """The merges while `n_new` chunks leave the recent window, until there are `recent` recent tokens."""
        return plan_spans(spans, n_new, self.most_spans(self.n_recent + self.chunk_size - 1), self.most_spans(recent))

    def is_exceeded(self, n_stored: int) -> bool:
        """Whether so many entries are more than the budget allows."""
        return self.budget is not None and n_stored > self.budget

    def most_spans(self, recent: int) -> int:
        """Spans that the budget has room for beside sinks and so many recent tokens."""
        return sys.maxsize if self.budget is None else (self.budget - self.n_sink - recent) // self.entries

    def n_chunks(self, n_seen: int) -> int:
        """Chunks that have left the recent window when `n_seen` tokens have been seen.

        The window never grows by two tokens for one, so these never become fewer.
        """
        n_recent = max(self.n_recent, math.floor(self.recent_share * n_seen))
        return max(0, n_seen - self.n_sink - n_recent) // self.chunk_size

    def n_groups(self, n_seen: int) -> int:
        """Groups of 32 tokens that have been quantized when `n_seen` tokens have been seen, clustered ones included."""
        return 0 if self.n_exact is None else max(0, n_seen - self.n_sink - self.n_exact) // GROUP

    def n_spans(self, n_seen: int) -> int:
        """Spans when `n_seen` tokens have been seen: a chunk adds one span to those that fitted just before."""
        chunks = self.n_chunks(n_seen)
        recent = n_seen - self.n_sink - chunks * self.chunk_size
        before = self.most_spans(self.n_recent + self.chunk_size - 1)
        return min(chunks, before + 1, self.most_spans(recent))

    def n_steps(self, chunks: int, spans: int) -> int:
        """What cannot be undone in `spans` spans made of `chunks` chunks: merges, and clusterings that merge tokens."""
        is_final = self.entries < self.chunk_size or self.is_quantized
        return chunks - spans + (chunks if is_final else 0)

    def least_seen(self, spans: tuple[int, ...], n_seen: int, n_groups: int = 0) -> int:
        """The fewest of the `n_seen` tokens after which nothing of these spans and groups would have to be undone."""
        steps = self.n_steps(sum(spans), len(spans)) + n_groups

        def steps_of(n: int) -> int:
            return self.n_steps(self.n_chunks(n), self.n_spans(n)) + self.n_groups(n)

        return bisect.bisect_left(range(n_seen + 1), steps, key=steps_of)


@functools.lru_cache(maxsize=16)  # the layers of a model ask the same
def plan_spans(spans: tuple[int, ...], n_new: int, most_before: int, most_now: int) -> SpanPlan:
    """The plan with at most `most_before` spans just before a chunk leaves, and `most_now` in the end.

    The reference checks the budget after every token. While no chunk leaves, recent tokens only become more and spans
    only fewer, so checking after the last of these tokens alone merges the same pairs in the same order.
    """
    chunks, slots, depths = list(spans), list(range(len(spans))), [0] * len(spans)
    rounds: list[list[tuple[int, int]]] = []
    for n_left in range(n_new + 1):  # chunks that have left by now
        while len(chunks) > (most_now if n_left == n_new else most_before):
            pair_sizes = list(map(operator.add, chunks[:-1], chunks[1:]))
            older = pair_sizes.index(min(pair_sizes))  # of equal pairs, the oldest
            pair = slice(older, older + 2)
            depth = max(depths[pair])  # rounds that this merge waits for
            if depth == len(rounds):
                rounds.append([])
            rounds[depth].append((slots[older], slots[older + 1]))
            chunks[pair], slots[pair], depths[pair] = [pair_sizes[older]], [slots[older]], [depth + 1]
        if n_left < n_new:
            chunks.append(1)
            slots.append(len(spans) + n_left)
            depths.append(0)
    slot_rounds = ((tuple(pair[0] for pair in pairs), tuple(pair[1] for pair in pairs)) for pairs in rounds)
    return SpanPlan(tuple(chunks), tuple(slots), tuple(slot_rounds))
