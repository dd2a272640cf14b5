"""Wrong parts: what stands in the place of a right one in a mistake (see `mistakes`)."""

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from kvcluster import reference
from kvcluster.reference.merging import Clustering, merge
from kvcluster.reference.partition import alternating_partition
from kvcluster.reference.selection import Selection
from kvcluster.reference.similarity import halving_sum, similarity

from .case import Case

Patch = tuple[str, str, Any]  # module of the reference ("" is the package), name in it, what stands there instead


# Matching.


def swapped_partition(size: int) -> tuple[np.ndarray, np.ndarray]:
    return alternating_partition(size)[::-1]


def wrong_round(
    *, last_destination: bool = False, last_source: bool = False, is_reordered: bool = False
) -> Callable[[np.ndarray, int], np.ndarray]:
    """`match_round` with ties to the largest index, or with the entries that stay in another order."""

    def match_round(centroids: np.ndarray, n_merged: int) -> np.ndarray:
        sources, destinations = alternating_partition(len(centroids))
        similarities = similarity(centroids[sources], centroids[destinations])
        chosen = similarities.argmax(axis=-1)
        if last_destination:
            chosen = similarities.shape[-1] - 1 - similarities[:, ::-1].argmax(axis=-1)
        best = similarities.max(axis=-1)
        best_first = np.argsort(-best, kind="stable")
        if last_source:
            best_first = len(best) - 1 - np.argsort(-best[::-1], kind="stable")
        merged = best_first[:n_merged]
        entry = np.arange(len(centroids))
        entry[sources[merged]] = destinations[chosen[merged]]
        stays = entry == np.arange(len(centroids))
        number = np.cumsum(stays) - 1
        if is_reordered:  # sources that stay, then destinations, as ToMe has them
            order = np.concatenate([np.sort(best_first[n_merged:]) * 2, destinations])
            number = np.zeros(len(centroids), int)
            number[order] = np.arange(len(order))
        return number[entry]

    return match_round


def one_round(case: Case) -> Case:
    """A target that one round reaches."""
    chunk_size = case.parameters.get("chunk_size", 64)
    least = (chunk_size - chunk_size // 2) / chunk_size
    return replace(case, parameters={**case.parameters, "keep_ratio": max(least, case.parameters["keep_ratio"])})


def of_first_head(keys: np.ndarray, **parameters: Any) -> Clustering:
    made = right_matching(keys, **parameters)
    if keys.ndim == 2:
        return made
    return Clustering(*(np.broadcast_to(x[..., :1, :], x.shape) for x in (made.labels, made.counts)))


right_matching = reference.chunked_soft_matching


def rounds_with(mean: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """`match_chunk` whose rounds go on from `mean(keys, labels, centroids before, entry of each)`."""

    def match_chunk(keys: np.ndarray, target: int) -> np.ndarray:
        labels, size, centroids = np.arange(len(keys)), len(keys), keys.astype(np.float32)
        match_round = sys.modules["kvcluster.reference.soft_matching"].match_round
        while size > target:
            n_merged = min(size // 2, size - target)
            entry = match_round(centroids, n_merged)
            labels, size = entry[labels], size - n_merged
            centroids = mean(keys, labels, centroids, entry)
        return labels

    return match_chunk


def mean_of_centroids(keys: np.ndarray, labels: np.ndarray, centroids: np.ndarray, entry: np.ndarray) -> np.ndarray:
    """Each centroid of the round before weighs the same, whatever its count."""
    return merge(centroids, Clustering(entry, np.bincount(entry)))


def rounded_to_dtype(keys: np.ndarray, labels: np.ndarray, *_: np.ndarray) -> np.ndarray:
    return rounded_mean(keys, Clustering(labels, np.bincount(labels)))


def similarity_in_float32(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = (
        x.astype(np.float32) / np.maximum(np.linalg.norm(x.astype(np.float32), axis=-1, keepdims=True), 1e-30)
        for x in (a, b)
    )
    return (a @ np.swapaxes(b, -1, -2)).astype(np.float64)


def dot_product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return halving_sum(a.astype(np.float64)[..., :, None, :] * b.astype(np.float64)[..., None, :, :])


def without_sign(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.abs(similarity(a, b))


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    found = similarity(a, b)
    return np.sign(found) * np.sqrt(np.abs(found))


def euclidean(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return -((a.astype(np.float64)[..., :, None, :] - b.astype(np.float64)[..., None, :, :]) ** 2).sum(axis=-1)


def with_partial_chunk(keys: np.ndarray, *, keep_ratio: float, chunk_size: int = 64) -> Clustering:
    """The trailing partial chunk is clustered too."""
    whole = keys.shape[-2] // chunk_size * chunk_size
    spans = [(keys[..., :whole, :], chunk_size), (keys[..., whole:, :], keys.shape[-2] - whole)]
    return joined([right_matching(x, keep_ratio=keep_ratio, chunk_size=n) for x, n in spans if n])


def without_last_chunk(keys: np.ndarray, *, keep_ratio: float, chunk_size: int = 64) -> Clustering:
    """The last whole chunk is left as it is."""
    whole = max(0, keys.shape[-2] // chunk_size - 1) * chunk_size
    rest = np.broadcast_to(np.arange(keys.shape[-2] - whole), (*keys.shape[:-2], keys.shape[-2] - whole))
    first = right_matching(keys[..., :whole, :], keep_ratio=keep_ratio, chunk_size=chunk_size)
    return joined([first, Clustering(rest, np.ones(rest.shape, int))])


def joined(clusterings: list[Clustering]) -> Clustering:
    labels, n_entries = [], 0
    for one in clusterings:
        labels.append(one.labels + n_entries)
        n_entries += one.counts.shape[-1]
    return Clustering(np.concatenate(labels, axis=-1), np.concatenate([one.counts for one in clusterings], axis=-1))


def rounded_down(keep_ratio: float, chunk_size: int) -> int:
    return max(1, int(keep_ratio * chunk_size))


# Means.


def mean_by(add: Callable[[np.ndarray], np.ndarray]) -> Callable[..., np.ndarray]:
    """`merge` whose sums are `add` of a cluster's members (members, dim)."""

    def wrong_merge(array: np.ndarray, clustering: Clustering) -> np.ndarray:
        merge(array, clustering)  # its errors
        labels, counts = clustering.labels, clustering.counts
        means = np.empty((*counts.shape, array.shape[-1]), np.float32)
        for place in np.ndindex(*counts.shape):
            total = add(array[place[:-1]][labels[place[:-1]] == place[-1]])
            means[place] = (total / total.dtype.type(counts[place])).astype(np.float32)
        return means

    return wrong_merge


def add_descending(members: np.ndarray) -> np.ndarray:
    return np.add.accumulate(members[::-1].astype(np.float64), axis=0)[-1]


def add_in_float32(members: np.ndarray) -> np.ndarray:
    return np.add.accumulate(members.astype(np.float32), axis=0, dtype=np.float32)[-1]


def add_to_zero(members: np.ndarray) -> np.ndarray:
    return np.add.accumulate(np.concatenate([np.zeros((1, members.shape[-1])), members.astype(np.float64)]), axis=0)[-1]


def merging(wrong: Callable[..., np.ndarray]) -> tuple[Patch, ...]:
    """A wrong `merge` wherever the reference uses it, and the same mean in k-means."""

    def update(keys: np.ndarray, labels: np.ndarray, centroids: np.ndarray) -> np.ndarray:
        used, entry = np.unique(labels, return_inverse=True)
        means = centroids.copy()
        if len(used) and keys.dtype != np.float64:  # not deviations
            means[used] = wrong(keys, Clustering(entry, np.bincount(entry)))
        return means if keys.dtype != np.float64 else right_update(keys, labels, centroids)

    merged = [(module, "merge", wrong) for module in ("", "cache", "soft_matching", "distinctive_matching")]
    return (*merged, *((module, "update", update) for module in ("kmeans", "recall")))


def rounded_mean(array: np.ndarray, clustering: Clustering) -> np.ndarray:
    return merge(array, clustering).astype(array.dtype).astype(np.float32)


def update_to_zero(keys: np.ndarray, labels: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    return np.where(
        np.bincount(labels, minlength=len(centroids))[:, None] == 0,
        np.float32(0),
        right_update(keys, labels, centroids),
    )


right_update = sys.modules["kvcluster.reference.kmeans"].update


def lloyd_from_first_tokens(keys: np.ndarray, centroids: np.ndarray, *options: Any) -> tuple[np.ndarray, np.ndarray]:
    return right_lloyd(keys, keys[: len(centroids)].astype(np.float32), *options)


def lloyd_that_assigns_last(keys: np.ndarray, *options: Any) -> tuple[np.ndarray, np.ndarray]:
    _, centroids = right_lloyd(keys, *options)
    return sys.modules["kvcluster.reference.kmeans"].assign(keys, centroids), centroids


def assign_to_the_last(keys: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    return len(centroids) - 1 - similarity(keys, centroids[::-1]).argmax(axis=-1)


right_lloyd = sys.modules["kvcluster.reference.kmeans"].lloyd


# Attention.


def logs(wrong: Callable[[np.ndarray], np.ndarray]) -> tuple[Patch, ...]:
    return tuple((module, "log_counts", wrong) for module in ("clustered_attention",))


def quiet_log(counts: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.log(counts.astype(np.float64))


def log_of_float16(counts: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return quiet_log(np.minimum(counts.astype(np.float16), np.finfo(np.float16).max))


def without(name: str) -> Callable[[Case], Case]:
    """The same case, `name` not given."""
    return lambda case: replace(case, parameters={k: v for k, v in case.parameters.items() if k != name})


def shifted(name: str, by: int) -> Callable[[Case], Case]:
    """The same case, `name` by so much larger."""

    def change(case: Case) -> Case:
        before = case.parameters.get(name, {"kmeans": 10, "RecallCache": 4}[case.operation])
        return replace(case, parameters={**case.parameters, name: max(0, before + by)})

    return change


def given(name: str, value: Any) -> Callable[[Case], Case]:
    return lambda case: replace(case, parameters={**case.parameters, name: value})


def unscaled(case: Case) -> Case:
    return replace(case, parameters={**case.parameters, "scale": 1.0})


def arrays(**changes: Callable[[np.ndarray], np.ndarray]) -> Callable[[Case], Case]:
    """The same case with some of its arrays changed."""

    def change(case: Case) -> Case:
        changed = {name: changes[name](x) if name in changes else x for name, x in case.arrays.items()}
        return replace(case, arrays=changed)

    return change


def dealt_in_turn(query: np.ndarray) -> np.ndarray:
    """Query heads dealt out to KV heads in turn instead of in runs."""
    if query.ndim < 3:
        return query
    *lead, heads, group, dim = query.shape
    return query.reshape(*lead, heads * group, dim).reshape(*lead, group, heads, dim).swapaxes(-2, -3)


def dealt_back(output: np.ndarray) -> np.ndarray:
    """The outputs that belong to `dealt_in_turn`, in the order of the query heads."""
    if output.ndim < 3:
        return output
    *lead, heads, group, dim = output.shape
    return output.swapaxes(-2, -3).reshape(*lead, heads, group, dim)


# Selection.


def scores_by(combine: Callable[[np.ndarray], np.ndarray], *, has_mean: bool = True) -> tuple[Patch, ...]:
    """Cluster scores that the queries of a group are combined to otherwise."""
    module = sys.modules["kvcluster.reference.cluster_scores"]

    def cluster_scores(
        query: np.ndarray, centroids: np.ndarray, counts: np.ndarray, deviations: np.ndarray, spread: float
    ) -> np.ndarray:
        reach = (float(spread) * np.abs(query.astype(np.float64))).astype(np.float32)
        scores = module.dots(query, centroids, reach, deviations)
        if has_mean:
            means = [module.mean_cluster(x, counts) for x in (centroids, deviations)]
            scores = scores - module.dots(query, means[0], reach, means[1])
        return combine(scores)

    return (("selection", "cluster_scores", cluster_scores),)


def choosing(wrong: Callable[..., np.ndarray]) -> tuple[Patch, ...]:
    """`select_clusters` whose taken tokens are `wrong(scores, counts, budget, right ones)`."""
    module = sys.modules["kvcluster.reference.selection"]

    def select_clusters(
        query: np.ndarray, centroids: np.ndarray, counts: np.ndarray, *, budget: int, **more: Any
    ) -> Selection:
        right = right_select(query, centroids, counts, budget=budget, **more)
        deviations = more.get("deviations")
        deviations = np.zeros_like(centroids) if deviations is None else deviations
        scores = module.cluster_scores(query, centroids, counts, deviations, more.get("spread", 0.5))
        return Selection(wrong(scores, counts.astype(np.int64), budget, right.taken))

    return tuple((place, "select_clusters", select_clusters) for place in ("", "selection", "recall", "recall_cache"))


right_select = reference.select_clusters


def spend(counts: np.ndarray, ranking: np.ndarray, budget: int) -> np.ndarray:
    """Tokens taken of each cluster by another ranking, or with another budget, than the right one."""
    ranked = np.take_along_axis(counts, ranking, axis=-1)
    taken = np.empty_like(ranked)
    np.put_along_axis(taken, ranking, np.clip(budget - (ranked.cumsum(axis=-1) - ranked), 0, ranked), axis=-1)
    return taken


def with_budget(by: int) -> tuple[Patch, ...]:
    """`select_clusters` of a budget that is so much larger."""

    def more(scores: np.ndarray, counts: np.ndarray, budget: int, right: np.ndarray) -> np.ndarray:
        return spend(counts, np.argsort(-scores, axis=-1, kind="stable"), budget + by)

    return choosing(more)


def without_deviations() -> tuple[Patch, ...]:
    module = sys.modules["kvcluster.reference.cluster_scores"]

    def cluster_scores(query: np.ndarray, centroids: np.ndarray, counts: np.ndarray, *_: Any) -> np.ndarray:
        return module.cluster_scores(query, centroids, counts, np.zeros_like(centroids), 0.0)

    return (("selection", "cluster_scores", cluster_scores),)


def untrimmed(scores: np.ndarray, counts: np.ndarray, budget: int, right: np.ndarray) -> np.ndarray:
    return np.where(right > 0, counts, 0)


def last_dropped(scores: np.ndarray, counts: np.ndarray, budget: int, right: np.ndarray) -> np.ndarray:
    return np.where(right == counts, right, 0)


def ties_to_the_last(scores: np.ndarray, counts: np.ndarray, budget: int, right: np.ndarray) -> np.ndarray:
    ranking = scores.shape[-1] - 1 - np.argsort(-scores[..., ::-1], axis=-1, kind="stable")
    return spend(counts, ranking, budget)


# Caches.


def boundaries_at_zero(case: Case) -> Case:
    """Sinks are taken out of the first chunk, so that chunks begin at multiples of the chunk size."""
    chunk, sinks = case.parameters.get("chunk_size", 64), case.parameters.get("n_sink", 4)
    return replace(case, parameters={**case.parameters, "n_sink": -(-sinks // chunk) * chunk})


def budget_beside_sinks(case: Case) -> Case:
    sinks = case.parameters.get("n_sink", 16)
    return replace(case, parameters={**case.parameters, "budget": case.parameters["budget"] + sinks})


def zero_is_none(case: Case) -> Case:
    size = case.parameters.get("prompt_segment_size", 512) or None
    return replace(case, parameters={**case.parameters, "prompt_segment_size": size})


class ClusteredByArrival(reference.ClusteredCache):
    """Single tokens cluster nothing: chunks that are due wait for the next prompt."""

    def append(self, keys: np.ndarray, values: np.ndarray) -> Any:
        kept, self.n_recent = self.n_recent, 2**40 if keys.shape[-2] == 1 else self.n_recent
        made = super().append(keys, values)
        self.n_recent = kept
        return made


class ClusteredLate(reference.ClusteredCache):
    def _cluster_what_left_the_window(self) -> None:
        self.n_recent += 1
        super()._cluster_what_left_the_window()
        self.n_recent -= 1


class OneChunkAnAppend(reference.ClusteredCache):
    def _cluster_what_left_the_window(self) -> None:
        kept, recent = self.n_recent, self.n_seen - self.n_sink - self.n_clustered
        if recent - self.n_recent >= self.chunk_size:
            self.n_recent = recent - self.chunk_size
        super()._cluster_what_left_the_window()
        self.n_recent = kept


class WithCountsChanged(reference.RecallCache):
    """Entries whose counts are other ones: `n_sink` sinks come first, then recent tokens, then what is recalled."""

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
