"""`ChelseaCache`."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from kvcluster import reference
from kvcluster.reference.pooled_matching import compress_entries

from ..caches import (
    attended,
    beside,
    cache_spelling,
    fill,
    good_tokens,
    held_by,
    numbers_of,
    refused_tokens,
    small_tokens,
)
from ..case import Case
from ..changes import given, without
from ..drawing import Drawing
from ..inputs import DTYPES, KINDS, attention_arrays
from ..mistake import Mistake, Patch
from ..operation import Operation
from ..pooling import POOLING, told_steps
from ..port import THE_REFERENCE, Port
from ..whole_heads import WHOLE_HEADS, refused_heads, returned_counts, whole_head_cases
from .alternating_partition import PARTITION
from .attention import HEADS, WEIGHTS
from .similarity import SIMILARITY

__all__ = ["OPERATION"]

PLAN: dict[str, Any] = {
    "ratio": 0.3,
    "max_new_tokens": 22,
    "interval": 6,
    "chunk_size": 16,
    "n_sink": 3,
    "n_recent": 10,
}


def cases(base: int) -> Iterator[Case]:
    kinds = [kind for kind in KINDS if kind != "huge"]  # whose attention has no bound
    settings = ((16, (130,)), (2, (0, 1, 80, 49)), (5, (90, *[1] * 40)), (256, (70, 60)))
    for index, (dtype, kind) in enumerate((d, k) for d in DTYPES for k in kinds):
        chunk_size, pieces = settings[index % 4]
        arrays = attention_arrays(kind, (2,), 3, 130, (16, 5, 8)[index % 3], dtype, base + 200 + index)
        name = f"{kind}-C{chunk_size}-P{len(pieces)}-{dtype}"
        yield Case("ChelseaCache", name, arrays, {**PLAN, "chunk_size": chunk_size, "pieces": pieces})
    arrays = attention_arrays("normal", (1, 2), 2, 180, 8, "f32", base + 230)
    changes: dict[str, dict[str, Any]] = {
        "defaults": {"ratio": 0.25, "max_new_tokens": 60, "pieces": (170, 10)},
        "prompt-in-pieces": {"n_prompt": 120, "pieces": (50, 50, 20, *[1] * 30, 30)},
        "prompt-at-once": {"n_prompt": 120, "pieces": (120, *[1] * 30, 30)},
        "prompt-of-none": {"n_prompt": 0, "max_new_tokens": 180, "pieces": (1,) * 180},
        "no-tokens-first": {"pieces": (0, 100, 0, 80)},
        "interval-0": {"interval": 0, "pieces": (150, *[1] * 30)},
        "interval-40": {"interval": 40, "pieces": (90, *[1] * 90)},
        "just-grown": {"n_prompt": 130, "pieces": (52, 1, 6, 1, 120)},  # budget 46, and 6 more
        "product-rounded-up": {"ratio": 0.07, "max_new_tokens": 60, "pieces": (140, 40)},
        "all-in-one-centroid": {"ratio": 0.01, "pieces": (90, 45, 45)},
        "ratio-1": {"ratio": 1.0, "pieces": (100, 40, 40)},
        "short-prompt": {"ratio": 0.5, "max_new_tokens": 100, "pieces": (2, *[1] * 90, 88)},
        "no-sink": {"n_sink": 0, "pieces": (120, 60)},
        "no-recent": {"n_recent": 0, "pieces": (120, 60)},
        "nothing-exact": {"n_sink": 0, "n_recent": 0, "pieces": (120, 30, 30)},
        "scale": {"scale": 0.7, "pieces": (180,)},
    }
    for name, changed in changes.items():
        yield Case("ChelseaCache", name, arrays, {**PLAN, **changed})
    for dtype in DTYPES:  # many compressions, in which the centroids' own bits matter
        arrays = attention_arrays("smooth", (3,), 2, 160, 16, dtype, base + 231)
        yield Case("ChelseaCache", f"many-{dtype}", arrays, {**PLAN, "pieces": (60, *[20] * 5)})
    same = np.ones((1, 60, 4), np.float32)  # all tie
    equal = {"query": same[:, :2], "keys": same, "values": same * np.arange(60, dtype=np.float32)[:, None]}
    yield Case("ChelseaCache", "equal-keys", equal, {**PLAN, "chunk_size": 8, "pieces": (50, 10)})
    large = attention_arrays("normal", (1,), 2, 2070, 2, "f32", base + 233)  # a count that float16 cannot represent
    yield Case("ChelseaCache", "large-count", large, {**PLAN, "ratio": 0.001, "pieces": (2070,)})
    short = attention_arrays("normal", (1,), 1, 5, 8, "f32", base + 232)
    yield Case("ChelseaCache", "shorter-than-sinks", short, {**PLAN, "n_sink": 9, "pieces": (2, 3)})
    yield from whole_head_cases("ChelseaCache", {**PLAN, "chunk_size": 8}, base + 240)


def refused() -> Iterator[Case]:
    rule = {"ratio": 0.5, "max_new_tokens": 4, "chunk_size": 2, "n_sink": 1, "n_recent": 2}
    yield from refused_tokens("ChelseaCache", rule, {**rule, "ratio": 2.0})
    yield from refused_heads("ChelseaCache", rule)
    wrong = {"ratio": 0.0, "max_new_tokens": -1, "n_prompt": -1, "interval": -1, "chunk_size": 1, "n_sink": -1}
    for name, value in {**wrong, "n_recent": -1}.items():
        parameters = {**rule, name: value, "pieces": (8,)}
        yield Case("ChelseaCache", f"refused-{name}", good_tokens(), parameters, is_refused=True)


def small(draw: Drawing) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    draw.heads = draw.integer(1, 2)
    arrays, parameters = small_tokens(draw)
    sizes = {"chunk_size": draw.integer(2, 5), "n_sink": draw.integer(0, 2), "n_recent": draw.integer(0, 2)}
    sizes |= {"max_new_tokens": draw.integer(0, 4), "interval": draw.integer(0, 2)}
    options: tuple[dict[str, Any], ...] = ({}, {"n_prompt": 4}, {"whole_heads": (draw.heads - 1,)})
    return arrays, {**parameters, "ratio": draw.ratio(), **sizes, **draw.one_of(options)}


def filled_cache(port: Port, case: Case) -> tuple[Any, Any]:
    """The cache of a case, and what its last append returned."""
    cache, parameters = cache_spelling(port, case)
    filled = cache(**parameters)
    return filled, fill(port, filled, case)


def call(operation: Operation, port: Port, case: Case) -> dict[str, np.ndarray]:
    cache, returned = filled_cache(port, case)
    results = numbers_of(port, cache, ("budget", "n_seen", "n_stored"))
    results |= held_by(port, cache, ("keys", "values", "counts", "whole_keys", "whole_values"))
    results |= returned_counts(port, returned) | attended(port, cache, case)
    return results | beside(port, cache, returned)


def oracle(case: Case) -> tuple[Any, ...]:
    return case.arrays["query"], *filled_cache(THE_REFERENCE, case)[0].entries(), case.parameters.get("scale")


def pattern(kinds: set[str], results: set[str]) -> tuple[str, str] | None:
    if results == {"returned_counts"}:
        return "append returns the entries after its compression: it returns those before, the new tokens last", "17.11"
    return None


class Told(reference.ChelseaCache):
    """Says what it does, of the first head that is clustered."""

    def __init__(self, **parameters: Any) -> None:
        super().__init__(**parameters)
        self.told: list[str] = []

    def _cluster_what_is_due(self) -> None:
        stored, size, was_known = (self.keys, self.values, self.counts), self.n_stored, self.budget is not None
        super()._cluster_what_is_due()
        if self.budget is None:
            return
        if not was_known:
            self.told.append(f"the budget is {self.budget} entries, and {self.interval} more are let grow")
        if self.n_stored == size:
            self.told.append(f"{size} entries are stored: nothing is compressed")
            return
        start, stop, target = self.n_sink, size - self.n_recent, self.budget - self.n_sink - self.n_recent
        self.told.append(f"{size} entries are stored: entries {start} to {stop - 1} become {target}")
        keys, values, counts = stored
        body = keys[..., start:stop, :], values[..., start:stop, :], counts[..., start:stop]
        self.told += told_steps(*body, target, self.chunk_size) if counts.size else ()


def decisions(case: Case) -> Iterator[str]:
    _, parameters = cache_spelling(THE_REFERENCE, case)
    cache = Told(**parameters)
    fill(THE_REFERENCE, cache, case)
    yield from cache.told


class Ruled(reference.ChelseaCache):
    """The right cache in pieces; a mistake is a subclass with another one."""

    def _cluster_what_is_due(self) -> None:
        if self.n_seen == 0:
            return
        self.budget = self.new_budget(self.n_seen if self.n_prompt is None else self.n_prompt)
        if self.is_due():
            start, stop = self.n_sink, self.n_stored - self.n_recent
            body = self.keys[..., start:stop, :], self.values[..., start:stop, :], self.counts[..., start:stop]
            target = self.budget - self.n_sink - self.n_recent
            self._replace(start, stop, *compress_entries(*body, target=target, chunk_size=self.chunk_size))

    def new_budget(self, n_prompt: int) -> int:
        if self.budget is not None:
            return self.budget
        return max(self.rounded(self.ratio * (n_prompt + self.max_new_tokens)), self.n_sink + self.n_recent + 1)

    def rounded(self, product: float) -> int:
        return math.ceil(product)

    def is_due(self) -> bool:
        return self.n_stored > self.budget + self.interval


class RoundedDown(Ruled):
    def rounded(self, product: float) -> int:
        return math.floor(product)


class Exact(Ruled):
    def rounded(self, product: float) -> int:
        return math.ceil(round(product, 9))


class BesideExact(Ruled):
    def rounded(self, product: float) -> int:
        return math.ceil(product) + self.n_sink + self.n_recent


class AtTheBudget(Ruled):
    def is_due(self) -> bool:
        return self.n_stored >= self.budget + self.interval and self.n_stored > self.budget


class Following(Ruled):
    """The budget is that of all tokens seen so far."""

    def new_budget(self, n_prompt: int) -> int:
        self.budget = None
        return super().new_budget(self.n_seen)


class OneByOne(reference.ChelseaCache):
    def append(self, keys: np.ndarray, values: np.ndarray) -> Any:
        if self.n_seen == 0 and self.n_prompt is None:
            return super().append(keys, values)
        seen = super().append(keys[..., :0, :], values[..., :0, :])
        for token in range(keys.shape[-2]):
            seen = super().append(keys[..., token : token + 1, :], values[..., token : token + 1, :])
        return seen


class WholeInBudget(Ruled):
    """What whole heads keep is taken off the budget of the others, evenly."""

    def new_budget(self, n_prompt: int) -> int:
        budget = super().new_budget(n_prompt)
        if self.budget is not None or not self.whole_heads or not self.keys.shape[-3]:
            return budget
        more = len(self.whole_heads) * max(0, self.n_seen - budget) // self.keys.shape[-3]
        return max(budget - more, self.n_sink + self.n_recent + 1)


def replaced_cache(wrong: type) -> tuple[Patch, ...]:
    return (("", "ChelseaCache", wrong),)


RULES = (
    Mistake("the budget is rounded up from the exact product: from the float64 product", "17.3", replaced_cache(Exact)),
    Mistake("the budget is rounded down: it is rounded up", "17.3", replaced_cache(RoundedDown)),
    Mistake("the budget is without max_new_tokens: of prompt and generation", "17.3", change=given(max_new_tokens=0)),
    Mistake(
        "n_prompt is ignored: the budget is that of a prompt of so many tokens", "17.3", change=without("n_prompt")
    ),
    Mistake(
        "sinks and recent tokens are not counted: the budget is all stored entries", "17.3", replaced_cache(BesideExact)
    ),
    Mistake(
        "the budget grows with the tokens seen: it is known from the first append and never changes",
        "17.3",
        replaced_cache(Following),
    ),
    Mistake(
        "interval is ignored: the cache is compressed when it exceeds the budget by more than that",
        "17.4",
        change=given(interval=0),
    ),
    Mistake(
        "the cache is compressed an entry early: when it exceeds budget + interval", "17.4", replaced_cache(AtTheBudget)
    ),
    Mistake("the cache is compressed in the middle of an append: after it, once", "17.4", replaced_cache(OneByOne)),
    Mistake("sinks are clustered too", "17.2", change=given(n_sink=0)),
    Mistake("the recent tokens are clustered too", "17.2", change=given(n_recent=0)),
    Mistake("chunk_size is ignored: matches are found in chunks", "17.7", change=given(chunk_size=2**40)),
)
BUDGET_OF_HEADS = (
    Mistake(
        "whole heads are part of the budget: it is that of every other head", "17.12", replaced_cache(WholeInBudget)
    ),
)
OPERATION = Operation(
    name="ChelseaCache",
    section=17,
    options=("whole_heads",),
    cases=cases,
    refused=refused,
    small=small,
    spelling=cache_spelling,
    call=call,
    oracle=oracle,
    decisions=decisions,
    pattern=pattern,
    mistakes=(*RULES, *POOLING, *PARTITION, *SIMILARITY, *WEIGHTS, *HEADS, *WHOLE_HEADS, *BUDGET_OF_HEADS),
    scaffold="""
# append(keys, values), attend(query), n_seen, n_stored, budget
# ChelseaCache = my_package.ChelseaCache  # ratio, max_new_tokens, n_prompt, interval, whole_heads, chunk_size, ...
""",
)
