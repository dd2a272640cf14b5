"""`select_clusters`."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from kvcluster.reference import Selection
from kvcluster.reference import select_clusters as right_select
from kvcluster.reference.cluster_scores import cluster_scores as right_scores
from kvcluster.reference.cluster_scores import dots, mean_cluster

from ..case import Case
from ..drawing import Drawing
from ..inputs import DTYPES, KINDS, make_array, refused_arrays, some_counts
from ..mistake import Mistake, Patch
from ..operation import Operation
from .attention import HEADS

__all__ = ["OPERATION", "SELECTION"]


def cases(base: int) -> Iterator[Case]:
    for index, (dtype, kind) in enumerate((d, k) for d in DTYPES for k in KINDS):
        clusters, group, dim = ((1, 1, 5), (12, 4, 64), (30, 3, 80))[index % 3]
        arrays = {
            "query": make_array("normal", (2, group, dim), dtype, base + 90 + index),
            "centroids": make_array(kind, (2, clusters, dim), "f32", base + 91 + index),
            "counts": some_counts((2, clusters), index) * (np.arange(clusters) % 7 != 3),
        }
        total = int(arrays["counts"].sum(axis=-1).max())
        for budget in (total // 3, 0 if index % 2 else total + 5):
            name = f"{kind}-K{clusters}-G{group}-{dtype}-budget{budget}"
            yield Case("select_clusters", name, arrays, {"budget": budget})
    signs = {
        "query": make_array("signs", (2, 4, 8), "f32", base + 99),
        "centroids": make_array("signs", (2, 40, 8), "f32", base + 98),
        "counts": np.full((2, 40), 5),
    }
    for budget in (1, 37, 120):
        yield Case("select_clusters", f"ties-budget{budget}", signs, {"budget": budget})
    deviations = np.abs(make_array("normal", (2, 40, 8), "f32", base + 97))
    for spread in (0.5, 1.0):
        arrays = {**signs, "deviations": deviations}
        yield Case("select_clusters", f"deviations-spread{spread}", arrays, {"budget": 63, "spread": spread})


def refused() -> Iterator[Case]:
    centroids, bad = refused_arrays()
    arrays = {"query": centroids[:, :2], "centroids": centroids, "counts": np.ones((1, 8), int)}
    for name, array in bad.items():
        wrong = {**arrays, "centroids": array}
        yield Case("select_clusters", f"refused-{name}", wrong, {"budget": 3}, is_refused=True)
    yield Case("select_clusters", "refused-budget", arrays, {"budget": -1}, is_refused=True)


def small(draw: Drawing) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    clusters = draw.integer(1, 6)
    centroids = draw.rows(clusters)
    arrays = {"query": draw.rows(draw.integer(1, 2)), "centroids": centroids, "counts": draw.counts(clusters, 0)}
    return arrays, {"budget": draw.integer(0, 8)}


def decisions(case: Case) -> Iterator[str]:
    query, centroids, counts = (case.arrays[name] for name in ("query", "centroids", "counts"))
    deviations = case.arrays.get("deviations", np.zeros_like(centroids))
    scores = right_scores(query, centroids, counts, deviations, case.parameters.get("spread", 0.5))
    first = (0,) * (query.ndim - 2)
    left = case.parameters["budget"]
    for cluster in np.argsort(-scores[first], kind="stable"):
        taken = min(left, int(counts[first][cluster]))
        left -= taken
        yield f"cluster {cluster} scores {scores[first][cluster]:.17g}: {taken} of {counts[first][cluster]} tokens"


def scores_by(combine: Callable[[np.ndarray], np.ndarray], *, has_mean: bool = True) -> tuple[Patch, ...]:
    """Cluster scores that combine the queries of a group by `combine`."""

    def cluster_scores(
        query: np.ndarray, centroids: np.ndarray, counts: np.ndarray, deviations: np.ndarray, spread: float
    ) -> np.ndarray:
        reach = (float(spread) * np.abs(query.astype(np.float64))).astype(np.float32)
        scores = dots(query, centroids, reach, deviations)
        if has_mean:
            means = [mean_cluster(x, counts) for x in (centroids, deviations)]
            scores = scores - dots(query, means[0], reach, means[1])
        return combine(scores)

    return (("selection", "cluster_scores", cluster_scores),)


def scores_without_deviations(query: np.ndarray, centroids: np.ndarray, counts: np.ndarray, *_: Any) -> np.ndarray:
    return right_scores(query, centroids, counts, np.zeros_like(centroids), 0.0)


def choosing(wrong: Callable[..., np.ndarray]) -> tuple[Patch, ...]:
    """`select_clusters` whose taken tokens are `wrong(scores, counts, budget, right ones)`."""

    def select_clusters(
        query: np.ndarray, centroids: np.ndarray, counts: np.ndarray, *, budget: int, **options: Any
    ) -> Selection:
        right = right_select(query, centroids, counts, budget=budget, **options)
        deviations = options.get("deviations")
        deviations = np.zeros_like(centroids) if deviations is None else deviations
        scores = right_scores(query, centroids, counts, deviations, options.get("spread", 0.5))
        return Selection(wrong(scores, counts.astype(np.int64), budget, right.taken))

    return tuple((place, "select_clusters", select_clusters) for place in ("", "selection", "recall", "recall_cache"))


def spend(counts: np.ndarray, ranking: np.ndarray, budget: int) -> np.ndarray:
    """Tokens taken of each cluster, for a ranking or a budget that is not the right one."""
    ranked = np.take_along_axis(counts, ranking, axis=-1)
    taken = np.empty_like(ranked)
    np.put_along_axis(taken, ranking, np.clip(budget - (ranked.cumsum(axis=-1) - ranked), 0, ranked), axis=-1)
    return taken


def with_budget(by: int) -> tuple[Patch, ...]:
    """`select_clusters` with a budget larger by `by`."""

    def taken_with_budget(scores: np.ndarray, counts: np.ndarray, budget: int, right: np.ndarray) -> np.ndarray:
        return spend(counts, np.argsort(-scores, axis=-1, kind="stable"), budget + by)

    return choosing(taken_with_budget)


def untrimmed(scores: np.ndarray, counts: np.ndarray, budget: int, right: np.ndarray) -> np.ndarray:
    return np.where(right > 0, counts, 0)


def last_dropped(scores: np.ndarray, counts: np.ndarray, budget: int, right: np.ndarray) -> np.ndarray:
    return np.where(right == counts, right, 0)


def ties_to_the_last(scores: np.ndarray, counts: np.ndarray, budget: int, right: np.ndarray) -> np.ndarray:
    ranking = scores.shape[-1] - 1 - np.argsort(-scores[..., ::-1], axis=-1, kind="stable")
    return spend(counts, ranking, budget)


SELECTION = (
    Mistake("one token too few is taken: exactly budget tokens are", "11.6", with_budget(-1)),
    Mistake("one token too many is taken: exactly budget tokens are", "11.6", with_budget(1)),
    Mistake("the last cluster is not trimmed: exactly budget tokens are taken", "11.6", choosing(untrimmed)),
    Mistake(
        "the cluster in which the budget ends is left out: it is trimmed to its first tokens",
        "11.6",
        choosing(last_dropped),
    ),
    Mistake("ties between clusters go to the largest index: the smallest wins", "11.5", choosing(ties_to_the_last)),
    Mistake(
        "the first query of the group decides alone: a cluster's score is the maximum over the group",
        "11.4",
        scores_by(lambda scores: scores[..., 0, :]),
    ),
    Mistake(
        "scores are averaged over the group: they are the maximum over it",
        "11.4",
        scores_by(lambda scores: scores.mean(axis=-2)),
    ),
    Mistake(
        "the mean cluster's score is not taken off before the maximum over the group",
        "11.4",
        scores_by(lambda scores: scores.max(axis=-2), has_mean=False),
    ),
    Mistake(
        "deviations are ignored: spread * |query| . deviation belongs to a cluster's score",
        "11.2",
        (("selection", "cluster_scores", scores_without_deviations),),
    ),
)
OPERATION = Operation(
    name="select_clusters",
    section=11,
    results=("taken",),
    by_name=("deviations",),
    cases=cases,
    refused=refused,
    small=small,
    decisions=decisions,
    mistakes=(*HEADS, *SELECTION),
    scaffold='''
def select_clusters(query, centroids, counts, *, budget):
    """Tokens taken of each cluster (..., clusters)."""
    return my_package.select(query, centroids, counts, budget)
''',
)
