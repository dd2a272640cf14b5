"""`chunked_soft_matching`."""

import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from kvcluster.reference import alternating_partition, merge, similarity
from kvcluster.reference import chunked_soft_matching as right_matching
from kvcluster.reference.chunks import entries_of_chunk
from kvcluster.reference.merging import Clustering
from kvcluster.reference.soft_matching import match_round as right_round

from ..case import Case
from ..changes import given
from ..drawing import Drawing
from ..inputs import DTYPES, KINDS, make_array, refused_arrays
from ..mistake import Mistake, Patch
from ..operation import Operation
from .alternating_partition import PARTITION
from .merge import MEANS, ROUNDED, rounded_mean
from .similarity import SIMILARITY

__all__ = ["MATCHING", "OPERATION", "TARGET", "joined"]


def cases(base: int) -> Iterator[Case]:
    settings = ((0.5, 8), (0.25, 16), (0.2, 64), (0.7, 64), (1.0, 8), (0.01, 7), (0.5, 1), (0.3, 13))
    for index, (dtype, kind) in enumerate((d, k) for d in DTYPES for k in KINDS):
        keep_ratio, chunk_size = settings[index % len(settings)]
        tokens = 3 * chunk_size + index % 5
        keys = make_array(kind, (2, tokens, (16, 64, 80)[index % 3]), dtype, base + 20 + index)
        yield matching(f"{kind}-C{chunk_size}-keep{keep_ratio}-T{tokens}-{dtype}", keys, keep_ratio, chunk_size)
    for kind in ("signs", "normal"):  # many ties, two and three rounds, a partial chunk
        for keep_ratio in (0.25, 0.2, 0.6):
            keys = make_array(kind, (3, 140, 64), "f32", base + 50)
            yield matching(f"{kind}-heads-keep{keep_ratio}", keys, keep_ratio, 64)
    for tokens in (0, 1, 63, 64, 65):
        yield matching(f"normal-T{tokens}", make_array("normal", (1, tokens, 8), "f32", base + 60), 0.5, 64)
    for dtype in DTYPES:  # three rounds, in which the centroids' own bits matter
        yield matching(f"rounds-{dtype}", make_array("smooth", (6, 128, 16), dtype, base + 62), 0.15, 64)
        yield matching(f"near_ties-rounds-{dtype}", make_array("near_ties", (3, 96, 16), dtype, base + 64), 0.25, 32)
    for keep_ratio, chunk_size in ((0.28, 25), (0.55, 100), (0.07, 100)):  # products that float64 rounds up
        keys = make_array("normal", (1, 100, 4), "f32", base + 63)
        yield matching(f"target-keep{keep_ratio}", keys, keep_ratio, chunk_size)
    yield matching("equal-keys", np.ones((1, 32, 4), np.float32), 0.25, 16)
    yield matching("batch-and-heads", make_array("smooth", (2, 3, 40, 8), "f16", base + 61), 0.25, 16)


def matching(name: str, keys: np.ndarray, keep_ratio: float, chunk_size: int) -> Case:
    return Case("chunked_soft_matching", name, {"keys": keys}, {"keep_ratio": keep_ratio, "chunk_size": chunk_size})


def refused() -> Iterator[Case]:
    keys, bad = refused_arrays()
    rules: list[tuple[str, np.ndarray, dict[str, Any]]] = [
        (name, array, {"keep_ratio": 0.5, "chunk_size": 4}) for name, array in bad.items()
    ]
    rules += [(f"keep{keep_ratio}", keys, {"keep_ratio": keep_ratio}) for keep_ratio in (0.0, 1.5)]
    rules += [("chunk0", keys, {"keep_ratio": 0.5, "chunk_size": 0})]
    for name, array, rule in rules:
        yield Case("chunked_soft_matching", f"refused-{name}", {"keys": array}, rule, is_refused=True)


def small(draw: Drawing) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    return {"keys": draw.rows(draw.integer(1, 6))}, {"keep_ratio": draw.ratio(), "chunk_size": draw.integer(1, 6)}


def decisions(case: Case) -> Iterator[str]:
    keys, chunk_size = case.arrays["keys"], case.parameters.get("chunk_size", 256)
    keys = keys[(0,) * (keys.ndim - 2)]
    target = entries_of_chunk(case.parameters["keep_ratio"], chunk_size)
    yield f"a chunk of {chunk_size} tokens becomes {target} entries"
    for chunk in range(len(keys) // chunk_size):
        tokens = keys[chunk * chunk_size : (chunk + 1) * chunk_size]
        labels, size = np.arange(chunk_size), chunk_size
        while size > target:
            n_merged = min(size // 2, size - target)
            centroids = merge(tokens, Clustering(labels, np.bincount(labels)))
            yield f"chunk {chunk}, {size} entries of which {n_merged} merge:"
            yield from matches(centroids, n_merged)
            labels = right_round(centroids, n_merged)[labels]
            size -= n_merged


def matches(centroids: np.ndarray, n_merged: int) -> Iterator[str]:
    """A line for each source: its destination, what ties with it, and whether it merges."""
    sources, destinations = alternating_partition(len(centroids))
    similarities = similarity(centroids[sources], centroids[destinations])
    best = similarities.max(axis=-1)
    merged = np.argsort(-best, kind="stable")[:n_merged]
    for index, source in enumerate(sources):
        tied = destinations[similarities[index] == best[index]]
        line = f"  source {source} matches destination {tied[0]} (similarity {best[index]:.17g})"
        if len(tied) > 1:
            line += f"; {', '.join(map(str, tied))} tie exactly: the smallest index wins"
        line += "; it merges" if index in merged else "; it stays"
        rivals = [sources[other] for other in range(len(sources)) if other != index and best[other] == best[index]]
        if rivals and (index in merged) != all(list(sources).index(other) in merged for other in rivals):
            line += f", and ties with source {', '.join(map(str, rivals))}: those of the smallest index merge"
        yield line


def wrong_round(
    *, last_destination: bool = False, last_source: bool = False, is_reordered: bool = False
) -> tuple[Patch, ...]:
    """`match_round` with ties to the largest index, or with the remaining entries in another order."""

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

    return (("soft_matching", "match_round", match_round),)


def rounds_with(mean: Callable[..., np.ndarray]) -> tuple[Patch, ...]:
    """`match_chunk` whose next round starts from `mean(keys, labels, centroids before, entry of each)`."""

    def match_chunk(keys: np.ndarray, target: int) -> np.ndarray:
        labels, size, centroids = np.arange(len(keys)), len(keys), keys.astype(np.float32)
        match_round = sys.modules["kvcluster.reference.soft_matching"].match_round
        while size > target:
            n_merged = min(size // 2, size - target)
            entry = match_round(centroids, n_merged)
            labels, size = entry[labels], size - n_merged
            centroids = mean(keys, labels, centroids, entry)
        return labels

    return (("soft_matching", "match_chunk", match_chunk),)


def mean_of_centroids(keys: np.ndarray, labels: np.ndarray, centroids: np.ndarray, entry: np.ndarray) -> np.ndarray:
    """Every centroid of the previous round weighs the same, whatever its count."""
    return merge(centroids, Clustering(entry, np.bincount(entry)))


def rounded_to_dtype(keys: np.ndarray, labels: np.ndarray, *_: np.ndarray) -> np.ndarray:
    return rounded_mean(keys, Clustering(labels, np.bincount(labels)))


def one_round(case: Case) -> Case:
    """A target that one round reaches, of all heads or of each."""
    chunk_size = case.parameters.get("chunk_size", 256)
    least = (chunk_size - chunk_size // 2) / chunk_size
    if "keep_ratios" in case.parameters:
        return given(keep_ratios=tuple(max(least, ratio) for ratio in case.parameters["keep_ratios"]))(case)
    return given(keep_ratio=max(least, case.parameters["keep_ratio"]))(case)


def rounded_down(keep_ratio: float, chunk_size: int) -> int:
    return max(1, int(keep_ratio * chunk_size))


def of_first_head(keys: np.ndarray, **parameters: Any) -> Clustering:
    clustering = right_matching(keys, **parameters)
    if keys.ndim == 2:
        return clustering
    return Clustering(*(np.broadcast_to(x[..., :1, :], x.shape) for x in (clustering.labels, clustering.counts)))


def with_partial_chunk(keys: np.ndarray, *, keep_ratio: float, chunk_size: int = 256) -> Clustering:
    """The trailing partial chunk is clustered too."""
    n_whole = keys.shape[-2] // chunk_size * chunk_size
    spans = [(keys[..., :n_whole, :], chunk_size), (keys[..., n_whole:, :], keys.shape[-2] - n_whole)]
    return joined([right_matching(x, keep_ratio=keep_ratio, chunk_size=n) for x, n in spans if n])


def without_last_chunk(keys: np.ndarray, *, keep_ratio: float, chunk_size: int = 256) -> Clustering:
    """The last whole chunk is left as it is."""
    n_whole = max(0, keys.shape[-2] // chunk_size - 1) * chunk_size
    labels_of_rest = np.broadcast_to(np.arange(keys.shape[-2] - n_whole), (*keys.shape[:-2], keys.shape[-2] - n_whole))
    first = right_matching(keys[..., :n_whole, :], keep_ratio=keep_ratio, chunk_size=chunk_size)
    return joined([first, Clustering(labels_of_rest, np.ones(labels_of_rest.shape, int))])


def joined(clusterings: list[Clustering]) -> Clustering:
    labels, n_entries = [], 0
    for clustering in clusterings:
        labels.append(clustering.labels + n_entries)
        n_entries += clustering.counts.shape[-1]
    counts = [clustering.counts for clustering in clusterings]
    return Clustering(np.concatenate(labels, axis=-1), np.concatenate(counts, axis=-1))


def replaced_matching(wrong: object) -> tuple[Patch, ...]:
    return tuple((place, "chunked_soft_matching", wrong) for place in ("", "soft_matching"))


ROUNDS = (
    Mistake(
        "ties between destinations go to the largest index: of equal similarities the smallest index wins",
        "5.4",
        wrong_round(last_destination=True),
    ),
    Mistake(
        "ties between sources go to the largest index: of equal matches those of the smallest index merge",
        "5.5",
        wrong_round(last_source=True),
    ),
    Mistake(
        "entries change their order: those that stay keep it, whether source or destination",
        "5.6",
        wrong_round(is_reordered=True),
    ),
)
TARGET = (
    Mistake(
        "the target is rounded down: it is ceil(keep_ratio * chunk_size)",
        "5.1",
        (("chunks", "entries_of_chunk", rounded_down),),
    ),
)
CHUNKS = (
    Mistake("there is one round only: rounds go on until the target is reached", "5.3", change=one_round),
    Mistake(
        "all leading indices share one matching: each is its own problem",
        "1.1",
        replaced_matching(of_first_head),
    ),
    Mistake(
        "later rounds average centroids without their counts: a centroid is the mean of its original tokens",
        "5.7",
        rounds_with(mean_of_centroids),
    ),
    Mistake(
        "centroids between rounds are rounded to the dtype of the keys: they go on in float32",
        "5.7",
        rounds_with(rounded_to_dtype),
    ),
)
PARTIAL = (
    Mistake(
        "the trailing partial chunk is clustered: it must stay as it is",
        "5.2",
        (("", "chunked_soft_matching", with_partial_chunk),),
    ),
)
LAST = (
    Mistake(
        "the last whole chunk is left out: every whole chunk is clustered",
        "5.2",
        replaced_matching(without_last_chunk),
    ),
)
BEFORE, AFTER = (*PARTITION, *ROUNDS, *SIMILARITY, *TARGET, *CHUNKS), (*LAST, *MEANS, *ROUNDED)
MATCHING = (*BEFORE, *AFTER)  # of a cache, which has no partial chunk
OPERATION = Operation(
    name="chunked_soft_matching",
    section=5,
    results=("labels", "counts"),
    cases=cases,
    refused=refused,
    small=small,
    decisions=decisions,
    mistakes=(*BEFORE, *PARTIAL, *AFTER),
    scaffold='''
def chunked_soft_matching(keys, *, keep_ratio, chunk_size=256):
    """labels (..., tokens), counts (..., entries)."""
    return my_package.match(keys, keep_ratio, chunk_size)
''',
)
