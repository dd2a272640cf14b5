"""The cases of the conformance suite: for every public operation, what goes in.

What must come out is not stored: the reference says it, see `comparing`. Cases keep their name and their numbers
for good, since others hold them as files (see `vectors`): new ones come beside them.
"""

import functools
from collections.abc import Iterator

import numpy as np

from kvcluster.reference import kmeans

from .cache_cases import clustered_cache_cases, recall_cache_cases
from .case import OPERATIONS, Case
from .inputs import DTYPES, KINDS, attention_arrays, make_array
from .refused_cases import refused

__all__ = ["all_cases"]


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


def distinctive_cases(base: int) -> Iterator[Case]:
    settings = ((0.4, 20, 3), (0.25, 16, 4), (0.5, 9, 40), (0.1, 8, 1), (1.0, 8, 4), (0.7, 13, 2))
    for index, (dtype, kind) in enumerate((d, k) for d in DTYPES for k in KINDS):
        keep_ratio, chunk_size, n_shared = settings[index % len(settings)]
        lead, tokens = (2, 1 + index % 3), 2 * chunk_size + index % 4
        made = keys_and_values(kind, (*lead, tokens), ((16, 5), (64, 80), (7, 7))[index % 3], dtype, base + 150 + index)
        name = f"{kind}-C{chunk_size}-keep{keep_ratio}-shared{n_shared}-{dtype}"
        parameters = {"keep_ratio": keep_ratio, "chunk_size": chunk_size, "n_shared": n_shared}
        yield Case("distinctive_matching", name, made, parameters)
    plan = {"keep_ratio": 0.4, "chunk_size": 20, "n_shared": 3}
    for dtype in DTYPES:  # the ends of chunks, where fewer neighbours count, and the bits of means
        made = keys_and_values("smooth", (2, 2, 180), (16, 16), dtype, base + 180)
        yield Case("distinctive_matching", f"chunks-{dtype}", made, plan)
    made = keys_and_values("normal", (2, 600), (8, 8), "f32", base + 181)
    yield Case("distinctive_matching", "defaults", made, {"keep_ratio": 0.25})
    yield Case("distinctive_matching", "no-heads", keys_and_values("signs", (47,), (8, 8), "f32", base + 182), plan)
    for tokens in (0, 19):
        made = keys_and_values("normal", (2, tokens), (8, 8), "f32", base + 183)
        yield Case("distinctive_matching", f"normal-T{tokens}", made, plan)
    same = np.ones((2, 40, 4), np.float32)  # all tie
    yield Case("distinctive_matching", "equal-tokens", {"keys": same, "values": same}, plan)
    phrase = same.copy()
    phrase[:, 11:14] = -1
    for name, keys, values in (("phrase-of-keys", phrase, same), ("phrase-of-values", same, phrase)):
        yield Case("distinctive_matching", name, {"keys": keys, "values": values}, plan)


def keys_and_values(
    kind: str, shape: tuple[int, ...], dims: tuple[int, int], dtype: str, seed: int
) -> dict[str, np.ndarray]:
    """Both of one kind; `dims` are dim and dim_value."""
    return {
        name: make_array(kind, (*shape, dim), dtype, 2 * seed + i)
        for i, (name, dim) in enumerate(zip(("keys", "values"), dims, strict=True))
    }


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


MAKERS = {
    "alternating_partition": partition_cases,
    "similarity": similarity_cases,
    "chunked_soft_matching": matching_cases,
    "distinctive_matching": distinctive_cases,
    "merge": merge_cases,
    "attention": attention_cases,
    "clustered_attention": clustered_attention_cases,
    "ClusteredCache": clustered_cache_cases,
    "kmeans": kmeans_cases,
    "select_clusters": selection_cases,
    "recall_attention": recall_cases,
    "RecallCache": recall_cache_cases,
}
