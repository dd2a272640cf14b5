"""The cases of the conformance suite: for every public operation, what goes in.

A case is arrays and parameters by name, as the operation takes them. What must come out is not stored: the reference
says it, see `operations`.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .. import kmeans
from .inputs import DTYPES, KINDS, make_array

__all__ = ["OPERATIONS", "Case", "all_cases"]

OPERATIONS = (
    "alternating_partition",
    "similarity",
    "chunked_soft_matching",
    "merge",
    "attention",
    "clustered_attention",
    "ClusteredCache",
    "kmeans",
    "select_clusters",
    "recall_attention",
    "RecallCache",
)


@dataclass(frozen=True, eq=False)
class Case:
    """What one call gets.

    Attributes
    ----------
    operation : a public name of `kvcluster.reference`.
    name : unique within the operation.
    arrays : arguments that are arrays. `labels`, `counts` and `centroids` make up one argument where the operation
        takes a `Clustering` or `Clusters`. Caches get `keys`, `values` in pieces, then `query`.
    parameters : the other arguments; `pieces`, of caches, are the numbers of tokens of each append.
    is_refused : whether the call must raise ValueError or TypeError.
    """

    operation: str
    name: str
    arrays: dict[str, np.ndarray]
    parameters: dict[str, Any] = field(default_factory=dict)
    is_refused: bool = False


def all_cases(operations: tuple[str, ...] = OPERATIONS, seed: int = 0) -> Iterator[Case]:
    """Every case of `operations`, in their order; another `seed` puts other numbers into them."""
    for operation in operations:
        yield from cases_of(operation, seed)


@functools.lru_cache(maxsize=64)
def cases_of(operation: str, seed: int) -> tuple[Case, ...]:
    return (*MAKERS[operation](1_000 * seed), *refused(operation))


def partition_cases(base: int) -> Iterator[Case]:
    for size in (0, 1, 2, 3, 64, 65):
        yield Case("alternating_partition", f"size{size}", {}, {"size": size})


def similarity_cases(base: int) -> Iterator[Case]:
    for index, (dtype, kind) in enumerate((d, k) for d in DTYPES for k in KINDS):
        dim = (1, 2, 5, 64, 80, 128)[index % 6]
        arrays = {
            "a": make_array(kind, (2, 7, dim), dtype, base + 10 + index),
            "b": make_array(kind, (2, 9, dim), dtype, base + index),
        }
        yield Case("similarity", f"{kind}-D{dim}-{dtype}", arrays)


def matching_cases(base: int) -> Iterator[Case]:
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
        yield matching(
            f"target-keep{keep_ratio}", make_array("normal", (1, 100, 4), "f32", base + 63), keep_ratio, chunk_size
        )
    yield matching("equal-keys", np.ones((1, 32, 4), np.float32), 0.25, 16)
    yield matching("batch-and-heads", make_array("smooth", (2, 3, 40, 8), "f16", base + 61), 0.25, 16)


def matching(name: str, keys: np.ndarray, keep_ratio: float, chunk_size: int) -> Case:
    return Case("chunked_soft_matching", name, {"keys": keys}, {"keep_ratio": keep_ratio, "chunk_size": chunk_size})


def merge_cases(base: int) -> Iterator[Case]:
    for index, (dtype, kind) in enumerate((d, k) for d in DTYPES for k in KINDS):
        tokens, entries = 60, (1, 7, 60)[index % 3]
        labels = scattered_labels((2, tokens), entries, base + 30 + index)
        counts = np.stack([np.bincount(row, minlength=entries) for row in labels])
        array = make_array(kind, (2, tokens, 12), dtype, base + 30 + index)
        yield Case("merge", f"{kind}-E{entries}-{dtype}", {"array": array, "labels": labels, "counts": counts})
    negative = np.full((1, 4, 3), -0.0, np.float32)
    arrays = {"array": negative, "labels": np.array([[0, 1, 1, 2]]), "counts": np.array([[1, 2, 1]])}
    yield Case("merge", "negative-zeros", arrays)
    wide = np.array([[[2.0**80], [1.0], [-(2.0**80)], [3.0]]], np.float32)  # the order of addition shows
    yield Case("merge", "wide-range", {"array": wide, "labels": np.zeros((1, 4), int), "counts": np.array([[4]])})


def scattered_labels(shape: tuple[int, int], entries: int, seed: int) -> np.ndarray:
    """Labels (problems, tokens), every entry with at least one token."""
    order = make_array("normal", (*shape, 1), "f32", seed)[..., 0].argsort(axis=-1, kind="stable")
    return np.take_along_axis(np.arange(shape[1])[None].repeat(shape[0], 0) % entries, order, axis=-1)


def attention_cases(base: int, operation: str = "attention") -> Iterator[Case]:
    shapes = ((1, 1, 1), (3, 65, 64), (4, 200, 80), (1, 63, 16), (2, 2, 5))
    for index, (dtype, kind) in enumerate((d, k) for d in DTYPES for k in ("normal", "signs", "smooth", "tiny")):
        group, tokens, dim = shapes[index % len(shapes)]
        arrays = attention_arrays(kind, (2,), group, tokens, dim, dtype, base + 40 + index)
        for scale in (None, 0.3):
            parameters = {} if scale is None else {"scale": scale}
            if operation == "clustered_attention":
                arrays = {**arrays, "counts": some_counts((2, tokens), index)}
            yield Case(operation, f"{kind}-G{group}-T{tokens}-D{dim}-{dtype}-scale{scale or ''}", arrays, parameters)


def clustered_attention_cases(base: int) -> Iterator[Case]:
    yield from attention_cases(base, "clustered_attention")
    arrays = attention_arrays("normal", (1,), 2, 12, 16, "f32", base + 45)
    large = np.array([[1, 2049, 4099, 65503, 1, 1, 300, 7, 1, 1, 2, 30001]])
    yield Case("clustered_attention", "large-counts", {**arrays, "counts": large})
    yield Case("clustered_attention", "counts-of-zero", {**arrays, "counts": large * (np.arange(12) % 3 > 0)})
    keys = np.repeat(arrays["keys"], [3], axis=0)
    batch = {"query": np.stack([arrays["query"][0] * (i + 1) for i in range(3)]), "keys": keys, "values": keys}
    yield Case("clustered_attention", "heads-differ", {**batch, "counts": some_counts((3, 12), 3)})


def attention_arrays(
    kind: str, lead: tuple[int, ...], group: int, tokens: int, dim: int, dtype: str, seed: int
) -> dict[str, np.ndarray]:
    shapes = {"query": (*lead, group, dim), "keys": (*lead, tokens, dim), "values": (*lead, tokens, dim)}
    return {
        name: make_array("normal" if name == "query" else kind, shape, dtype, 3 * seed + i)
        for i, (name, shape) in enumerate(shapes.items())
    }


def some_counts(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """From 1 to 40, int64."""
    return 1 + (np.abs(make_array("normal", (*shape, 1), "f32", seed)[..., 0]) * 10).astype(np.int64)


def kmeans_cases(base: int) -> Iterator[Case]:
    for index, (dtype, kind) in enumerate((d, k) for d in DTYPES for k in KINDS):
        tokens, n_clusters = ((1, 1), (20, 20), (65, 5), (90, 11))[index % 4]
        keys = make_array(kind, (2, tokens, (5, 16, 64)[index % 3]), dtype, base + 70 + index)
        parameters = {"n_clusters": n_clusters, "max_iter": (1, 2, 3, 10)[index // 2 % 4]}
        yield Case("kmeans", f"{kind}-T{tokens}-K{n_clusters}-{dtype}", {"keys": keys}, parameters)
    keys = make_array("normal", (2, 50, 16), "f32", base + 80)
    yield Case("kmeans", "default-rounds", {"keys": keys}, {"n_clusters": 6})
    same = np.ones((1, 10, 4), np.float32)  # all go to the first cluster: the others keep their centroid
    yield Case("kmeans", "empty-clusters", {"keys": same}, {"n_clusters": 4})
    init = np.array([[49, 3, 3, 20], [0, 1, 2, 3]])
    yield Case("kmeans", "init-tokens", {"keys": keys, "init": init}, {"n_clusters": 4, "max_iter": 3})
    means = make_array("normal", (2, 4, 16), "f32", base + 81)
    yield Case("kmeans", "init-centroids", {"keys": keys, "init": means}, {"n_clusters": 4, "max_iter": 3})
    yield Case("kmeans", "centred", {"keys": keys + np.float32(3)}, {"n_clusters": 5, "is_centred": True})


def selection_cases(base: int) -> Iterator[Case]:
    for index, (dtype, kind) in enumerate((d, k) for d in DTYPES for k in KINDS):
        clusters, group, dim = ((1, 1, 5), (12, 4, 64), (30, 3, 80))[index % 3]
        arrays = {
            "query": make_array("normal", (2, group, dim), dtype, base + 90 + index),
            "centroids": make_array(kind, (2, clusters, dim), "f32", base + 91 + index),
            "counts": some_counts((2, clusters), index) * (np.arange(clusters) % 7 != 3),
        }
        total = int(arrays["counts"].sum(axis=-1).max())
        for budget in (total // 3, 0 if index % 2 else total + 5):
            parameters = {"budget": budget}
            yield Case("select_clusters", f"{kind}-K{clusters}-G{group}-{dtype}-budget{budget}", arrays, parameters)
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


def recall_cases(base: int) -> Iterator[Case]:
    for index, dtype in enumerate(DTYPES):
        arrays = attention_arrays("smooth", (2,), 3, 90, 16, dtype, base + 100 + index)
        made = kmeans(arrays["keys"], n_clusters=11, max_iter=3)
        arrays |= {"labels": made.labels, "counts": made.counts, "centroids": made.centroids}
        for budget in (1, 25, 90, 500):
            yield Case("recall_attention", f"{dtype}-budget{budget}", arrays, {"budget": budget})
        yield Case("recall_attention", f"{dtype}-scale", arrays, {"budget": 30, "scale": 0.7})
        yield Case("recall_attention", f"{dtype}-spread0", arrays, {"budget": 30, "spread": 0.0})
        yield Case("recall_attention", f"{dtype}-rest", arrays, {"budget": 30, "centroids_for_rest": True})


def clustered_cache_cases(base: int) -> Iterator[Case]:
    plan = {"keep_ratio": 0.25, "chunk_size": 16, "n_sink": 3, "n_recent": 20}
    for index, (dtype, kind) in enumerate((d, k) for d in DTYPES for k in ("smooth", "signs", "normal")):
        arrays = attention_arrays(kind, (2,), 3, 150, 16, dtype, base + 110 + index)
        for name, pieces in (("prompt", (150,)), ("split", (1, 2, 60, 1, 0, 37, 49)), ("tokens", (100, *[1] * 50))):
            yield Case("ClusteredCache", f"{kind}-{name}-{dtype}", arrays, {**plan, "pieces": pieces})
    arrays = attention_arrays("normal", (1, 2), 2, 200, 8, "f32", base + 120)
    changes: dict[str, dict[str, Any]] = {
        "defaults": {"keep_ratio": 0.25},
        "keep-all": {**plan, "keep_ratio": 1.0},
        "no-sink": {**plan, "n_sink": 0},
        "no-recent": {**plan, "n_recent": 0},
        "just-due": {**plan, "n_sink": 4, "pieces": (4 + 20 + 16 * 3, 15, 1)},
        "three-rounds": {**plan, "keep_ratio": 0.2, "chunk_size": 13},
    }
    for name, changed in changes.items():
        yield Case("ClusteredCache", name, arrays, {"pieces": (120, 80), **changed})
    short = attention_arrays("normal", (1,), 1, 5, 8, "f32", base + 121)
    yield Case("ClusteredCache", "shorter-than-sinks", short, {**plan, "n_sink": 9, "pieces": (2, 3)})
    yield Case("ClusteredCache", "scale", arrays, {**plan, "scale": 0.7, "pieces": (200,)})


def recall_cache_cases(base: int) -> Iterator[Case]:
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
    for name, changed in changes.items():
        yield Case("RecallCache", name, arrays, {**changed, "pieces": (150, 1, 49)})


def refused(operation: str) -> Iterator[Case]:
    """Calls that must raise: no number, no finite number, a wrong dtype, shapes that do not fit, out of range."""
    keys = make_array("normal", (1, 8, 4), "f32", 1)
    nan, infinite, double = keys.copy(), keys.copy(), keys.astype(np.float64)
    nan[0, 3, 1], infinite[0, 0, 0] = np.nan, np.inf
    bad = {"nan": nan, "infinity": infinite, "float64": double}
    good: dict[str, Any] = {"query": keys[:, :2], "keys": keys, "values": keys}
    if operation in ("attention", "clustered_attention"):
        more = {"counts": np.ones((1, 8), int)} if operation == "clustered_attention" else {}
        for name, array in bad.items():
            yield Case(operation, f"refused-{name}", {**good, "values": array, **more}, is_refused=True)
        yield Case(operation, "refused-shapes", {**good, "values": keys[:, :7], **more}, is_refused=True)
    if operation == "chunked_soft_matching":
        for name, array in bad.items():
            yield Case(operation, f"refused-{name}", {"keys": array}, {"keep_ratio": 0.5, "chunk_size": 4}, True)
        for keep_ratio in (0.0, 1.5):
            yield Case(operation, f"refused-keep{keep_ratio}", {"keys": keys}, {"keep_ratio": keep_ratio}, True)
        yield Case(operation, "refused-chunk0", {"keys": keys}, {"keep_ratio": 0.5, "chunk_size": 0}, True)
    if operation == "merge":
        labels, counts = np.zeros((1, 8), int), np.array([[8]])
        for name, array in bad.items():
            arrays = {"array": array, "labels": labels, "counts": counts}
            yield Case(operation, f"refused-{name}", arrays, is_refused=True)
        yield Case(operation, "refused-counts", {"array": keys, "labels": labels, "counts": counts - 1}, {}, True)
    if operation == "kmeans":
        for name, array in bad.items():
            yield Case(operation, f"refused-{name}", {"keys": array}, {"n_clusters": 2}, True)
        for n_clusters in (0, 9):
            yield Case(operation, f"refused-K{n_clusters}", {"keys": keys}, {"n_clusters": n_clusters}, True)
    if operation == "select_clusters":
        arrays = {"query": keys[:, :2], "centroids": keys, "counts": np.ones((1, 8), int)}
        for name, array in bad.items():
            yield Case(operation, f"refused-{name}", {**arrays, "centroids": array}, {"budget": 3}, True)
        yield Case(operation, "refused-budget", arrays, {"budget": -1}, True)
    if operation in ("ClusteredCache", "RecallCache"):
        rule = {"keep_ratio": 0.5} if operation == "ClusteredCache" else {"budget": 20, "n_sink": 2}
        for name, array in bad.items():
            yield Case(operation, f"refused-{name}", {**good, "keys": array}, {**rule, "pieces": (8,)}, True)
        wrong = {"keep_ratio": 2.0} if operation == "ClusteredCache" else {"budget": 0}
        yield Case(operation, "refused-parameter", good, {**wrong, "pieces": (8,)}, True)


MAKERS = {
    "alternating_partition": partition_cases,
    "similarity": similarity_cases,
    "chunked_soft_matching": matching_cases,
    "merge": merge_cases,
    "attention": attention_cases,
    "clustered_attention": clustered_attention_cases,
    "ClusteredCache": clustered_cache_cases,
    "kmeans": kmeans_cases,
    "select_clusters": selection_cases,
    "recall_attention": recall_cases,
    "RecallCache": recall_cache_cases,
}
