"""When chunks leave the recent tokens, which more than one cache decides: cases, refusals, and what goes wrong."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from kvcluster import reference

from .caches import good_tokens
from .case import Case
from .changes import given, without
from .inputs import DTYPES, attention_arrays
from .mistake import Mistake, Patch

__all__ = ["mistakes_of_chunks", "mistakes_of_shares", "recent_share_cases", "refused_shares"]

Replace = Callable[[type], tuple[Patch, ...]]  # how a wrong `ClusteredCache` takes the place of the right one


def recent_share_cases(operation: str, rules: dict[str, Any], lead: tuple[int, ...], seed: int) -> Iterator[Case]:
    """Recent tokens that grow with the text, in caches with these rules; eleven seeds are used."""
    settings = ((0.5, (90,)), (0.3, (20, 30, *[1] * 40)), (0.2, (0, 1, 49, 40)))
    for index, (dtype, kind) in enumerate((d, k) for d in DTYPES for k in ("smooth", "signs", "normal")):
        share, pieces = settings[(index + index // 3) % 3]
        arrays = attention_arrays(kind, lead, 2, 90, 8, dtype, seed + index)
        changed = {**rules, "chunk_size": (3, 5, 10)[index % 3], "recent_share": share, "pieces": pieces}
        yield Case(operation, f"{kind}-recent{share}-{dtype}", arrays, changed)
    arrays = attention_arrays("normal", lead, 2, 100, 8, "f32", seed + 9)
    changes: dict[str, dict[str, Any]] = {
        "product": {"recent_share": 0.29, "pieces": (60, 40)},  # 0.29 * 100 is below 29 in float64
        "of-none": {"recent_share": 0.0, "pieces": (60, 40)},
        "below-n-recent": {"recent_share": 0.1, "n_recent": 30, "pieces": (60, 40)},
        "alone": {"recent_share": 0.4, "n_recent": 0, "n_sink": 0, "pieces": (60, 40)},
        "many-sinks": {"recent_share": 0.5, "n_sink": 27, "pieces": (60, 40)},
        "of-a-short-prompt": {"recent_share": 0.25, "pieces": (12, *[1] * 88)},
    }
    for name, changed in changes.items():
        yield Case(operation, f"recent-{name}", arrays, {**rules, "chunk_size": 10, "n_sink": 2, **changed})
    short = attention_arrays("normal", lead, 1, 5, 8, "f32", seed + 10)
    yield Case(operation, "recent-of-five", short, {**rules, "recent_share": 0.5, "pieces": (2, 3)})


def refused_shares(operation: str, rules: dict[str, Any]) -> Iterator[Case]:
    """The tokens that are appended have one head."""
    for name, share in (("above", 0.6), ("negative", -0.1), ("nan", math.nan), ("bool", True), ("text", "0.1")):
        parameters = {**rules, "recent_share": share, "pieces": (8,)}
        yield Case(operation, f"refused-recent-{name}", good_tokens(), parameters, is_refused=True)


def boundaries_at_zero(case: Case) -> Case:
    """Sinks are taken out of the first chunk, so that chunks begin at multiples of the chunk size."""
    chunk, sinks = case.parameters.get("chunk_size", 256), case.parameters.get("n_sink", 16)
    return given(n_sink=-(-sinks // chunk) * chunk)(case)


class ByArrival(reference.ClusteredCache):  # single tokens cluster nothing: what is due waits for the next prompt
    def append(self, keys: np.ndarray, values: np.ndarray, queries: np.ndarray | None = None) -> Any:
        n_recent, self.n_recent = self.n_recent, 2**40 if keys.shape[-2] == 1 else self.n_recent
        entries = super().append(keys, values)
        self.n_recent = n_recent
        return entries


class Late(reference.ClusteredCache):
    def _cluster_what_is_due(self) -> None:
        self.n_recent += 1
        super()._cluster_what_is_due()
        self.n_recent -= 1


class OneChunkAnAppend(reference.ClusteredCache):
    def _cluster_what_is_due(self) -> None:
        n_recent, recent = self.n_recent, self.n_seen - self.n_sink - self.n_clustered
        if recent - self.n_recent >= self.chunk_size:
            self.n_recent = recent - self.chunk_size
        super()._cluster_what_is_due()
        self.n_recent = n_recent


class ByShare(reference.ClusteredCache):
    """The right recent tokens in pieces; a mistake is a subclass with another one."""

    def _cluster_what_is_due(self) -> None:
        rules = self.n_recent, self.recent_share
        if self.recent_share:
            self.n_recent, self.recent_share = self.at_least(self.rounded(float(self.recent_share) * self.whole())), 0.0
        super()._cluster_what_is_due()
        self.n_recent, self.recent_share = rules

    def whole(self) -> int:
        return self.n_seen

    def rounded(self, product: float) -> int:
        return math.floor(product)

    def at_least(self, n_shared: int) -> int:
        return max(self.n_recent, n_shared)


class OfEntries(ByShare):
    def whole(self) -> int:
        return self.n_stored


class BesideSinks(ByShare):
    def whole(self) -> int:
        return max(0, self.n_seen - self.n_sink)


class OfTheFirst(ByShare):
    """The share is that of the first append which has tokens."""

    n_first = 0

    def whole(self) -> int:
        self.n_first = self.n_first or self.n_seen
        return self.n_first


class Exact(ByShare):
    def rounded(self, product: float) -> int:
        return math.floor(round(product, 9))


class RoundedUp(ByShare):
    def rounded(self, product: float) -> int:
        return math.ceil(product)


class Added(ByShare):
    def at_least(self, n_shared: int) -> int:
        return self.n_recent + n_shared


def mistakes_of_chunks(replaced: Replace) -> tuple[Mistake, ...]:
    """Which tokens are clustered, and when."""
    return (
        Mistake(
            "chunk boundaries are shifted by the sinks: the first chunk begins at token n_sink",
            "9.3",
            change=boundaries_at_zero,
        ),
        Mistake("the recent tokens are clustered too", "9.2", change=given(n_recent=0)),
        Mistake("sinks are clustered too", "9.2", change=given(n_sink=0)),
        Mistake(
            "a chunk is clustered a token late: it is due as soon as n_recent tokens are younger", "9.4", replaced(Late)
        ),
        Mistake(
            "an append clusters one chunk at most: every chunk that is due is clustered",
            "9.4",
            replaced(OneChunkAnAppend),
        ),
        Mistake(
            "the cache depends on how the tokens arrived: chunks lie at absolute positions", "9.6", replaced(ByArrival)
        ),
    )


def mistakes_of_shares(replaced: Replace) -> tuple[Mistake, ...]:
    """How many recent tokens `recent_share` keeps."""
    return (
        Mistake("recent_share is ignored: recent tokens grow with the text", "9.4", change=without("recent_share")),
        Mistake("recent_share is of the tokens after the sinks: of all tokens seen", "9.4", replaced(BesideSinks)),
        Mistake(
            "recent_share is of the entries that are stored: of all tokens seen, so that all heads cluster at once",
            "9.4",
            replaced(OfEntries),
        ),
        Mistake("recent_share is of the first append: of all tokens seen so far", "9.4", replaced(OfTheFirst)),
        Mistake(
            "recent_share * n_seen is exact or float32: the float64 product is rounded down", "9.4", replaced(Exact)
        ),
        Mistake("recent_share * n_seen is rounded up: it is rounded down", "9.4", replaced(RoundedUp)),
        Mistake("recent_share comes on top of n_recent: the larger of both counts", "9.4", replaced(Added)),
    )
