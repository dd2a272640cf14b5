"""Mistakes in distinctive matching and in keeping a budget, as `mistakes` has those of all else."""

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from kvcluster import reference
from kvcluster.reference.merging import Clustering, merge
from kvcluster.reference.similarity import similarity

from .case import Case
from .mistake import Mistake
from .wrong_parts import joined, without

__all__ = ["OWN_MISTAKES"]

MODULE = sys.modules["kvcluster.reference.distinctive_matching"]
right_matching, right_match = reference.distinctive_matching, MODULE.match_distinctive
right_distinctiveness = MODULE.distinctiveness


def wrong_match(
    *,
    last_token: bool = False,
    last_destination: bool = False,
    first_destinations: bool = False,
    may_leave: bool = False,
    shared_first: bool = False,
    is_uncapped: bool = False,
) -> Callable[..., np.ndarray]:
    """`match_distinctive` with ties to the last token or destination, or with one of its other steps changed."""

    def match_distinctive(keys: np.ndarray, values: np.ndarray, target: int, n_shared: int) -> np.ndarray:
        *heads, size, _ = keys.shape
        if target == size:
            return right_match(keys, values, target, n_shared)
        n_shared = min(n_shared, target) if is_uncapped else max(1, min(n_shared, target // 2))
        n_exact = target - n_shared
        scores = MODULE.distinctiveness(keys, values)
        best_first = np.argsort(-scores, kind="stable")
        if last_token:
            best_first = size - 1 - np.argsort(-scores[::-1], kind="stable")
        exact, ordinary = np.sort(best_first[:n_exact]), np.sort(best_first[n_exact:])
        destinations = np.arange(n_shared) if first_destinations else np.arange(n_shared) * len(ordinary) // n_shared
        labels = np.empty((*heads, size), dtype=np.int64)
        labels[..., exact] = np.arange(n_exact) + (n_shared if shared_first else 0)
        for head in np.ndindex(*heads):
            similarities = similarity(keys[head][ordinary], keys[head][ordinary][destinations])
            match = similarities.argmax(axis=-1)
            if last_destination:
                match = n_shared - 1 - similarities[:, ::-1].argmax(axis=-1)
            if not may_leave:
                match[destinations] = np.arange(n_shared)
            labels[head][ordinary] = match + (0 if shared_first else n_exact)
        return labels

    return match_distinctive


def matched_by(**wrong: bool) -> tuple[tuple[str, str, Any], ...]:
    return (("distinctive_matching", "match_distinctive", wrong_match(**wrong)),)


def scored_by(wrong: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> tuple[tuple[str, str, Any], ...]:
    return (("distinctive_matching", "distinctiveness", wrong),)


def match_each_head_alone(keys: np.ndarray, values: np.ndarray, target: int, n_shared: int) -> np.ndarray:
    if keys.ndim == 2:
        return right_match(keys, values, target, n_shared)
    heads = zip(keys, values, strict=True)
    return np.stack([right_match(*head, target, n_shared) for head in heads])


def match_all_heads_together(keys: np.ndarray, values: np.ndarray, **rules: Any) -> Clustering:
    """As if batch rows were heads of one layer."""
    flat = (array.reshape(-1, *array.shape[-2:]) for array in (keys, values))
    made = right_matching(*flat, **rules)
    return Clustering(*(x.reshape(*keys.shape[:-2], x.shape[-1]) for x in (made.labels, made.counts)))


def with_partial_chunk(keys: np.ndarray, values: np.ndarray, *, chunk_size: int = 256, **rules: Any) -> Clustering:
    tokens = keys.shape[-2]
    whole = tokens // chunk_size * chunk_size
    spans = ((slice(whole), chunk_size), (slice(whole, tokens), tokens - whole))
    arrays = [(keys[..., span, :], values[..., span, :], size) for span, size in spans if size]
    return joined([right_matching(*pair, chunk_size=size, **rules) for *pair, size in arrays])


def likeness_to_rounded_mean(array: np.ndarray) -> np.ndarray:
    mean = merge(array, Clustering(np.zeros(len(array), dtype=np.int64), np.array([len(array)])))
    return similarity(array.astype(np.float32), mean.astype(array.dtype).astype(np.float32))[:, 0]


def divided_by_window(keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    size, reach = keys.shape[-2], MODULE.WINDOW // 2
    inside = np.array([min(size, token + reach + 1) - max(0, token - reach) for token in range(size)])
    return right_distinctiveness(keys, values) * inside / MODULE.WINDOW


def merge_the_last_of_equal_pairs(spans: list[int]) -> int:
    together = [spans[place] + spans[place + 1] for place in range(len(spans) - 1)]
    return len(together) - 1 - together[::-1].index(min(together))


def unweighted_mean(array: np.ndarray, counts: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return merge(array, Clustering(labels, np.bincount(labels)))


def budget_beside_sinks(case: Case) -> Case:
    budget = case.parameters.get("budget")
    sinks = case.parameters.get("n_sink", 4)
    return case if budget is None else replace(case, parameters={**case.parameters, "budget": budget + sinks})


class BudgetAtTheEnd(reference.ClusteredCache):
    """Spans are merged when an append is done, not after each of its tokens."""

    def append(self, keys: np.ndarray, values: np.ndarray) -> Any:
        kept, self.budget = self.budget, None
        made = super().append(keys, values)
        self.budget = kept
        self._merge_what_exceeds_the_budget()
        return made


DISTINCTIVE = ("distinctive_matching", "ClusteredCache")
CACHE = ("ClusteredCache",)
OWN_MISTAKES: tuple[Mistake, ...] = (
    Mistake(
        "values take no part in the scores: a token stands out by its key and by its value",
        "16.2",
        DISTINCTIVE,
        scored_by(lambda keys, values: right_distinctiveness(keys, np.zeros_like(values))),
    ),
    Mistake(
        "keys take no part in the scores: a token stands out by its key and by its value",
        "16.2",
        DISTINCTIVE,
        scored_by(lambda keys, values: right_distinctiveness(np.zeros_like(keys), values)),
    ),
    Mistake(
        "each head keeps tokens of its own: the heads of a layer are added and keep the same ones",
        "16.2",
        DISTINCTIVE,
        (("distinctive_matching", "match_distinctive", match_each_head_alone),),
    ),
    Mistake(
        "all leading axes are added: only the last of them is the heads of one layer",
        "16.1",
        DISTINCTIVE,
        tuple((place, "distinctive_matching", match_all_heads_together) for place in ("", "cache")),
    ),
    Mistake(
        "the mean of a chunk is rounded to the dtype of the tokens: it is float32",
        "16.2",
        DISTINCTIVE,
        (("distinctive_matching", "likeness_to_mean", likeness_to_rounded_mean),),
    ),
    Mistake(
        "scores are not averaged over neighbours: seven tokens count",
        "16.3",
        DISTINCTIVE,
        (("distinctive_matching", "WINDOW", 1),),
    ),
    Mistake(
        "scores near the ends of a chunk are divided by seven: fewer tokens lie in the chunk there",
        "16.3",
        DISTINCTIVE,
        scored_by(divided_by_window),
    ),
    Mistake(
        "the tokens that stand out least stay exact: those of the largest scores do",
        "16.4",
        DISTINCTIVE,
        scored_by(lambda keys, values: -right_distinctiveness(keys, values)),
    ),
    Mistake(
        "ties between scores go to the last token: of equal scores the first stay exact",
        "16.4",
        DISTINCTIVE,
        matched_by(last_token=True),
    ),
    Mistake(
        "the shared entries come first: the exact tokens do",
        "16.4",
        DISTINCTIVE,
        matched_by(shared_first=True),
    ),
    Mistake(
        "the first ordinary tokens are destinations: they are evenly spaced",
        "16.4",
        DISTINCTIVE,
        matched_by(first_destinations=True),
    ),
    Mistake(
        "ties between destinations go to the last: the first wins",
        "16.4",
        DISTINCTIVE,
        matched_by(last_destination=True),
    ),
    Mistake(
        "a destination joins an equal one before it: destinations stay",
        "16.4",
        DISTINCTIVE,
        matched_by(may_leave=True),
    ),
    Mistake(
        "n_shared is taken as it is: at most half of the target is shared",
        "16.4",
        DISTINCTIVE,
        matched_by(is_uncapped=True),
    ),
    Mistake(
        "the trailing partial chunk is matched: it must stay as it is",
        "16.1",
        ("distinctive_matching",),
        (("", "distinctive_matching", with_partial_chunk),),
    ),
    Mistake(
        "n_shared is ignored: chunks are clustered by distinctive matching", "9.3", CACHE, change=without("n_shared")
    ),
    Mistake("budget is ignored: spans are merged until it is kept", "9.11", CACHE, change=without("budget")),
    Mistake(
        "sinks are not counted: budget is all stored entries, sinks and recent included",
        "9.11",
        CACHE,
        change=budget_beside_sinks,
    ),
    Mistake(
        "the budget is kept after an append only: after each of its tokens",
        "9.11",
        CACHE,
        (("", "ClusteredCache", BudgetAtTheEnd),),
    ),
    Mistake(
        "of equal pairs of spans the youngest is merged: the oldest",
        "9.11",
        CACHE,
        (("cache", "smallest_pair", merge_the_last_of_equal_pairs),),
    ),
    Mistake(
        "the oldest pair of spans is merged: the pair of the fewest tokens",
        "9.11",
        CACHE,
        (("cache", "smallest_pair", lambda spans: 0),),
    ),
    Mistake(
        "entries of merged spans weigh the same: each weighs by its count",
        "9.12",
        CACHE,
        (("span_merging", "weighted_mean", unweighted_mean),),
    ),
)
