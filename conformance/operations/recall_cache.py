"""`RecallCache`."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from kvcluster import reference
from kvcluster.reference.sampling import sample_tokens

from ..caches import (
    attended,
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
from ..inputs import DTYPES, attention_arrays
from ..mistake import Mistake, Patch
from ..operation import Operation
from ..port import THE_REFERENCE, Port
from ..recall_bits import cases_of_bits, mistakes_of_bits, refused_bits
from .attention import HEADS, WEIGHTS
from .kmeans import CLUSTERS, lloyd_mistakes
from .merge import MEANS
from .select_clusters import SELECTION
from .similarity import SIMILARITY

__all__ = ["OPERATION"]


# of `as_published`, but for sizes
PUBLISHED = {
    "tokens_per_cluster": 10,
    "segment_size": 40,
    "prompt_segment_size": None,
    "init_seed": 2**32 - 1,
    "is_per_query_head": True,
    "is_exact_counted": False,
}
OPTIONS: dict[str, Any] = {"init_seed": 3, "is_per_query_head": True, "is_exact_counted": False}


def cases(base: int) -> Iterator[Case]:
    plan = {"budget": 40, "n_sink": 4, "n_recent": 2, "tokens_per_cluster": 4}
    plan |= {"segment_size": 16, "prompt_segment_size": 32}
    for index, (dtype, kind) in enumerate((d, k) for d in DTYPES for k in ("smooth", "signs")):
        arrays = attention_arrays(kind, (2,), 3, 150, 16, dtype, base + 130 + index)
        for name, pieces in (("prompt", (150,)), ("tokens", (101, *[1] * 49)), ("pieces", (1, 60, 0, 40, 49))):
            yield Case("RecallCache", f"{kind}-{name}-{dtype}", arrays, {**plan, "pieces": pieces})
    arrays = attention_arrays("smooth", (1, 2), 2, 200, 8, "f32", base + 140)
    changes: dict[str, dict[str, Any]] = {
        "absolute-segments": {**plan, "prompt_segment_size": 0},
        "one-segment": {**plan, "prompt_segment_size": None},
        "no-spread": {**plan, "spread": 0.0},
        "centred": {**plan, "is_centred": True},
        "rest": {**plan, "centroids_for_rest": True},
        "budget-covers-all": {**plan, "budget": 300},
        "scale": {**plan, "scale": 0.7},
    }
    changes |= {
        "sampled": {**plan, "init_seed": 7},
        "per-query-head": {**plan, "is_per_query_head": True},
        "budget-beside-exact": {**plan, "is_exact_counted": False},
        "published": {"budget": 48, "n_sink": 4, "n_recent": 0, "max_iter": 1000, "spread": 0.0, **PUBLISHED},
    }
    for name, changed in changes.items():
        yield Case("RecallCache", name, arrays, {**changed, "pieces": (150, 1, 49)})
    yield from cases_of_bits("RecallCache", plan, base + 460)


def refused() -> Iterator[Case]:
    yield from refused_tokens("RecallCache", {"budget": 20, "n_sink": 2}, {"budget": 0})
    for name, seed in (("seed", -1), ("seed-of-33-bits", 2**32)):
        wrong = {"budget": 20, "n_sink": 2, "init_seed": seed, "pieces": (8,)}
        yield Case("RecallCache", f"refused-{name}", good_tokens(), wrong, is_refused=True)
    yield from refused_bits("RecallCache")


def small(draw: Drawing) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    arrays, parameters = small_tokens(draw)
    sizes = {name: draw.integer(0, 2) for name in ("n_sink", "n_recent")}
    sizes |= {"segment_size": draw.integer(1, 3), "tokens_per_cluster": draw.integer(1, 3)}
    least = sizes["n_sink"] + sizes["n_recent"] + sizes["segment_size"]
    sizes |= {"prompt_segment_size": draw.one_of((0, 3)), "budget": least + draw.integer(0, 4)}
    options = draw.one_of(({}, *({name: value} for name, value in OPTIONS.items())))
    return arrays, {**parameters, **sizes, **options}


def filled_cache(port: Port, case: Case) -> Any:
    cache, parameters = cache_spelling(port, case)
    filled = cache(**parameters)
    fill(port, filled, case)
    return filled


def call(operation: Operation, port: Port, case: Case) -> dict[str, np.ndarray]:
    cache = filled_cache(port, case)
    results = numbers_of(port, cache, ("n_seen", "n_stored"))
    results |= held_by(port, cache, ("keys", "values"))
    if getattr(cache, "clusters", None) is not None:
        results |= port.parts(CLUSTERS, cache.clusters)
    if hasattr(cache, "select_clusters"):
        selection = cache.select_clusters(port.from_numpy(case.arrays["query"]))
        if selection is not None:
            results |= port.parts(("taken",), selection)
    results |= attended(port, cache, case)
    if case.parameters.get("is_per_query_head"):
        results["output"] = results["output"][..., None, :]  # (..., group, 1, dim_value): query heads are leading axes
    results |= held_by(port, cache, ("deviations",)) | held_by(port, getattr(cache, "clusters", None), ("members",))
    return results | numbers_of(port, cache, ("n_clustered",))


def oracle(case: Case) -> tuple[Any, ...]:
    cache, query = filled_cache(THE_REFERENCE, case), case.arrays["query"]
    keys, values, counts = cache.entries(cache.select_clusters(query))
    if case.parameters.get("is_per_query_head"):
        query, group = query[..., None, :], query.shape[-2]
        if keys.ndim < query.ndim:  # there is no body: all query heads attend to the same
            keys, values = (np.repeat(x[..., None, :, :], group, axis=-3) for x in (keys, values))
            counts = np.repeat(counts[..., None, :], group, axis=-2)
    return query, keys, values, counts, case.parameters.get("scale")


def budget_beside_sinks(case: Case) -> Case:
    return given(budget=case.parameters["budget"] + case.parameters.get("n_sink", 16))(case)


def zero_is_none(case: Case) -> Case:
    return given(prompt_segment_size=case.parameters.get("prompt_segment_size", 512) or None)(case)


class WithCountsChanged(reference.RecallCache):
    """A cache with other counts of entries: `n_sink` sinks come first, then recent tokens, then what is recalled."""

    def entries(self, selection: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        keys, values, counts = super().entries(selection)
        counts = counts.copy()
        if self.clusters is not None:
            self.change(counts, self.plan.n_sink, self.n_seen - self.n_clustered)
        return keys, values, counts

    def change(self, counts: np.ndarray, n_sink: int, n_exact: int) -> None:
        raise NotImplementedError


class WithoutSinks(WithCountsChanged):
    def change(self, counts: np.ndarray, n_sink: int, n_exact: int) -> None:
        counts[..., :n_sink] = 0


class WithoutRecent(WithCountsChanged):
    def change(self, counts: np.ndarray, n_sink: int, n_exact: int) -> None:
        counts[..., n_sink:n_exact] = 0


class WithOneTwice(WithCountsChanged):
    def change(self, counts: np.ndarray, n_sink: int, n_exact: int) -> None:
        counts[..., n_sink] = 2


class ForTheGroup(reference.RecallCache):
    """Query heads never choose alone."""

    def __init__(self, *, is_per_query_head: bool = False, **parameters: Any) -> None:
        super().__init__(**parameters)


def sampled_by(wrong: Callable[..., np.ndarray]) -> tuple[Patch, ...]:
    return (("recall_cache", "sample_tokens", wrong),)


def without_heads(n_tokens: int, n_drawn: int, *, seed: int, head: int, start: int) -> np.ndarray:
    return sample_tokens(n_tokens, n_drawn, seed=seed, head=0, start=start)


def without_starts(n_tokens: int, n_drawn: int, *, seed: int, head: int, start: int) -> np.ndarray:
    return sample_tokens(n_tokens, n_drawn, seed=seed, head=head, start=0)


def descending(n_tokens: int, n_drawn: int, *, seed: int, head: int, start: int) -> np.ndarray:
    return sample_tokens(n_tokens, n_drawn, seed=seed, head=head, start=start)[::-1]


def replaced_cache(wrong: type) -> tuple[Patch, ...]:
    return (("", "RecallCache", wrong),)


ATTENDED = (
    Mistake("sinks are not attended to: they always are", "13.11", replaced_cache(WithoutSinks)),
    Mistake("recent tokens are not attended to: they always are", "13.11", replaced_cache(WithoutRecent)),
    Mistake("the token before a segment boundary is attended to twice", "13.11", replaced_cache(WithOneTwice)),
    Mistake(
        "sinks are not counted: budget is all tokens attended to, sinks and recent included",
        "13.10",
        change=budget_beside_sinks,
    ),
    Mistake(
        "prompt_segment_size 0 is taken for None: the first append gets no segments of its own",
        "13.5",
        change=zero_is_none,
    ),
    Mistake(
        "centroids and deviations are not rounded to bfloat16",
        "13.7",
        (("recall_cache", "round_to_bfloat16", lambda array: array),),
    ),
)
AS_PUBLISHED = (
    Mistake("init_seed is ignored: the first centroids are drawn", "13.13", change=without("init_seed")),
    Mistake("all heads draw the same tokens: each has its own sample", "13.13", sampled_by(without_heads)),
    Mistake("all segments draw the same indices: each has its own sample", "13.13", sampled_by(without_starts)),
    Mistake("the sample is not in the order of the tokens", "13.13", sampled_by(descending)),
    Mistake(
        "the group recalls together: with is_per_query_head each query head does alone",
        "13.14",
        replaced_cache(ForTheGroup),
    ),
    Mistake(
        "sinks and recent tokens are counted in the budget: without is_exact_counted they come beside it",
        "13.10",
        change=without("is_exact_counted"),
    ),
)
OPERATION = Operation(
    name="RecallCache",
    section=13,
    cases=cases,
    refused=refused,
    small=small,
    spelling=cache_spelling,
    call=call,
    oracle=oracle,
    options=(*OPTIONS, "bits"),
    mistakes=(
        *SIMILARITY,
        *MEANS,
        *WEIGHTS,
        *HEADS,
        *lloyd_mistakes(max_iter=4),
        *SELECTION,
        *ATTENDED,
        *AS_PUBLISHED,
        *mistakes_of_bits(replaced_cache),
    ),
    scaffold="""
# append(keys, values), attend(query), n_seen, n_stored
# RecallCache = my_package.RecallCache
""",
)
