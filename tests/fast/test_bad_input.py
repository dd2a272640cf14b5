"""Bad input: one clear error that names argument, rule and value, in both backends the same."""

import functools

import numpy as np
import pytest
import torch
from inputs import DTYPES, to_torch

from kvcluster import fast, reference

GOOD = np.ones((2, 6, 4), dtype=np.float32)
WITH_NAN = np.where(np.arange(4) == 2, np.nan, GOOD).astype(np.float32)
WITH_INFINITY = np.where(np.arange(4) == 2, np.inf, GOOD).astype(np.float32)
COUNTS = np.ones((2, 6), dtype=np.int64)
LABELS = np.zeros((2, 6), dtype=np.int64)
HUGE = np.where(np.arange(6)[:, None] < 4, 3e38, -3e38).astype(np.float32) * GOOD

CASES = {
    "float64": ("chunked_soft_matching", (GOOD.astype(np.float64),), {"keep_ratio": 0.5}),
    "integers": ("chunked_soft_matching", (GOOD.astype(np.int32),), {"keep_ratio": 0.5}),
    "NaN": ("chunked_soft_matching", (WITH_NAN,), {"keep_ratio": 0.5}),
    "infinity": ("chunked_soft_matching", (WITH_INFINITY,), {"keep_ratio": 0.5}),
    "one axis": ("chunked_soft_matching", (GOOD[0, 0],), {"keep_ratio": 0.5}),
    "dim 0": ("chunked_soft_matching", (GOOD[..., :0],), {"keep_ratio": 0.5}),
    "keep_ratio 0": ("chunked_soft_matching", (GOOD,), {"keep_ratio": 0}),
    "keep_ratio above 1": ("chunked_soft_matching", (GOOD,), {"keep_ratio": 1.5}),
    "keep_ratio NaN": ("chunked_soft_matching", (GOOD,), {"keep_ratio": float("nan")}),
    "keep_ratio no number": ("chunked_soft_matching", (GOOD,), {"keep_ratio": "half"}),
    "chunk_size 0": ("chunked_soft_matching", (GOOD,), {"keep_ratio": 0.5, "chunk_size": 0}),
    "chunk_size no integer": ("chunked_soft_matching", (GOOD,), {"keep_ratio": 0.5, "chunk_size": 2.5}),
    "partition of -1": ("alternating_partition", (-1,), {}),
    "similarity NaN": ("similarity", (GOOD, WITH_NAN), {}),
    "similarity dims": ("similarity", (GOOD, GOOD[..., :3]), {}),
    "similarity heads": ("similarity", (GOOD, GOOD[:1]), {}),
    "attention no tokens": ("attention", (GOOD, GOOD[:, :0], GOOD[:, :0]), {}),
    "attention values": ("attention", (GOOD, GOOD, GOOD[:, :5]), {}),
    "attention query dim": ("attention", (GOOD[..., :3], GOOD, GOOD), {}),
    "attention query NaN": ("attention", (WITH_NAN, GOOD, GOOD), {}),
    "attention float64": ("attention", (GOOD, GOOD, GOOD.astype(np.float64)), {}),
    "counts shape": ("clustered_attention", (GOOD, GOOD, GOOD, COUNTS[:, :5]), {}),
    "counts floats": ("clustered_attention", (GOOD, GOOD, GOOD, COUNTS.astype(np.float32)), {}),
    "counts negative": ("clustered_attention", (GOOD, GOOD, GOOD, -COUNTS), {}),
    "counts all 0": ("clustered_attention", (GOOD, GOOD, GOOD, 0 * COUNTS), {}),
    "keep_ratio complex": ("chunked_soft_matching", (GOOD,), {"keep_ratio": np.complex64(0.5)}),
    "chunk_size bool": ("chunked_soft_matching", (GOOD,), {"keep_ratio": 0.5, "chunk_size": True}),
    "cache keep_ratio": ("ClusteredCache", (), {"keep_ratio": -1}),
    "cache chunk_size": ("ClusteredCache", (), {"keep_ratio": 0.5, "chunk_size": -1}),
    "cache n_sink": ("ClusteredCache", (), {"keep_ratio": 0.5, "n_sink": -1}),
    "cache n_recent": ("ClusteredCache", (), {"keep_ratio": 0.5, "n_recent": -1}),
    "kmeans NaN": ("kmeans", (WITH_NAN,), {"n_clusters": 2}),
    "kmeans n_clusters 0": ("kmeans", (GOOD,), {"n_clusters": 0}),
    "kmeans more clusters than tokens": ("kmeans", (GOOD,), {"n_clusters": 7}),
    "kmeans max_iter": ("kmeans", (GOOD,), {"n_clusters": 2, "max_iter": 0}),
    "kmeans init tokens": ("kmeans", (GOOD,), {"n_clusters": 2, "init": LABELS[:, :2] + 6}),
    "kmeans init of other heads": ("kmeans", (GOOD,), {"n_clusters": 2, "init": LABELS[:1, :2]}),
    "kmeans init dim": ("kmeans", (GOOD,), {"n_clusters": 2, "init": GOOD[:, :2, :3]}),
    "kmeans init NaN": ("kmeans", (GOOD,), {"n_clusters": 6, "init": WITH_NAN}),
    "kmeans overflow": ("kmeans", (HUGE,), {"n_clusters": 2, "is_centred": True}),
    "select query dim": ("select_clusters", (GOOD[..., :3], GOOD, COUNTS), {"budget": 3}),
    "select no query": ("select_clusters", (GOOD[:, :0], GOOD, COUNTS), {"budget": 3}),
    "select counts": ("select_clusters", (GOOD, GOOD, COUNTS[:, :5]), {"budget": 3}),
    "select counts floats": ("select_clusters", (GOOD, GOOD, GOOD[..., 0]), {"budget": 3}),
    "select counts negative": ("select_clusters", (GOOD, GOOD, -COUNTS), {"budget": 3}),
    "select budget": ("select_clusters", (GOOD, GOOD, COUNTS), {"budget": -1}),
    "select deviations": ("select_clusters", (GOOD, GOOD, COUNTS), {"budget": 3, "deviations": GOOD[:, :5]}),
    "select spread": ("select_clusters", (GOOD, GOOD, COUNTS), {"budget": 3, "spread": 1.5}),
    "recall cache budget": ("RecallCache", (), {"budget": 0}),
    "recall cache no room": ("RecallCache", (), {"budget": 17}),
    "recall cache segment": ("RecallCache", (), {"budget": 64, "segment_size": 48}),
    "recall cache tokens_per_cluster": ("RecallCache", (), {"budget": 512, "tokens_per_cluster": 0}),
    "recall cache prompt": ("RecallCache", (), {"budget": 512, "prompt_segment_size": -1}),
    "recall cache max_iter": ("RecallCache", (), {"budget": 512, "max_iter": 0}),
    "recall cache spread": ("RecallCache", (), {"budget": 512, "spread": -1}),
    "recall cache seed": ("RecallCache", (), {"budget": 512, "init_seed": -1}),
    "recall cache seed of 33 bits": ("RecallCache", (), {"budget": 512, "init_seed": 2**32}),
    "recall cache seed no integer": ("RecallCache", (), {"budget": 512, "init_seed": 0.5}),
    "recall cache budget of the body": ("RecallCache", (), {"budget": 0, "is_exact_counted": False}),
}
MERGES = {
    "labels of other tokens": (GOOD[:, :5], LABELS, COUNTS),
    "counts of other heads": (GOOD, LABELS, COUNTS[:1]),
    "an entry without tokens": (GOOD, LABELS, 0 * COUNTS),
    "labels beyond the entries": (GOOD, LABELS + 6, COUNTS),
    "negative labels": (GOOD, LABELS - 1, COUNTS),
    "counts of other labels": (GOOD, LABELS, COUNTS),
    "merge NaN": (WITH_NAN, LABELS, COUNTS),
}


def message(function, *arguments, **parameters):
    with pytest.raises((ValueError, TypeError)) as error:
        function(*arguments, **parameters)
    return error.type, str(error.value)


@pytest.mark.parametrize("case", CASES)
def test_both_backends_refuse_with_the_same_words(case):
    name, arguments, parameters = CASES[case]
    tensors = [to_torch(a) if isinstance(a, np.ndarray) else a for a in arguments]
    options = {name: to_torch(a) if isinstance(a, np.ndarray) else a for name, a in parameters.items()}
    refused = message(getattr(reference, name), *arguments, **parameters)
    assert refused == message(getattr(fast, name), *tensors, **options)
    assert "must" in refused[1]
    assert "got" in refused[1]


@pytest.mark.parametrize("case", MERGES)
def test_both_backends_refuse_a_wrong_clustering_with_the_same_words(case):
    array, labels, counts = MERGES[case]
    refused = message(reference.merge, array, reference.Clustering(labels, counts))
    tensors = fast.Clustering(to_torch(labels), to_torch(counts))
    assert refused == message(fast.merge, to_torch(array), tensors)


@pytest.mark.parametrize(
    "change", [lambda q: q[..., :3], lambda q: q[:1], lambda q: q / 0], ids=["dim", "heads", "NaN"]
)
def test_both_recall_caches_refuse_a_wrong_query_with_the_same_words(change):
    refused = set()
    for package, convert in ((reference, np.copy), (fast, to_torch)):
        cache = package.RecallCache(budget=5, n_sink=0, segment_size=2, tokens_per_cluster=1)
        cache.append(convert(GOOD), convert(GOOD))
        with np.errstate(divide="ignore"):
            refused.add(message(cache.attend, change(convert(GOOD))))
    clusters = reference.kmeans(GOOD, n_clusters=2)
    ours = fast.kmeans(to_torch(GOOD), n_clusters=2)
    refused.add(message(reference.recall_attention, GOOD, GOOD[:, :5], GOOD[:, :5], clusters, budget=2))
    refused.add(message(fast.recall_attention, *map(to_torch, (GOOD, GOOD[:, :5], GOOD[:, :5])), ours, budget=2))
    assert len(refused) == 2


EMPTY = {
    "ClusteredCache": {"keep_ratio": 0.5},
    "RaggedCache": {"keep_ratios": (0.5, 0.5)},
    "RecallCache": {"budget": 512},
    "ChelseaCache": {"ratio": 0.5, "max_new_tokens": 3},
}


@pytest.mark.parametrize("kind", EMPTY)
@pytest.mark.parametrize("n_appends", [0, 1])
def test_a_query_to_a_cache_of_no_tokens_is_refused_with_the_same_words(kind, n_appends):
    refused = set()
    for package, convert in ((reference, np.copy), (fast, to_torch)):
        cache = getattr(package, kind)(**EMPTY[kind])
        for _ in range(n_appends):
            cache.append(*(convert(np.empty((1, 2, 0, 16), np.float32)) for _ in range(2)))
        refused.add(message(cache.attend, convert(np.ones((1, 2, 3, 16), np.float32))))
    assert len(refused) == 1


def test_the_other_frameworks_arrays_are_refused():
    with pytest.raises(TypeError, match="keys must be a NumPy array, got Tensor"):
        reference.chunked_soft_matching(to_torch(GOOD), keep_ratio=0.5)
    with pytest.raises(TypeError, match="keys must be a torch tensor, got ndarray"):
        fast.chunked_soft_matching(GOOD, keep_ratio=0.5)
    with pytest.raises(TypeError, match="counts must be a NumPy array, got list"):
        reference.clustered_attention(GOOD, GOOD, GOOD, [1, 2])
    with pytest.raises(TypeError, match="counts must be a torch tensor, got list"):
        fast.clustered_attention(*[to_torch(GOOD)] * 3, [1, 2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_empty_input_gives_an_empty_clustering(dtype):
    keys = GOOD[:, :0].astype(DTYPES[dtype])
    for backend, array in ((reference, keys), (fast, to_torch(keys))):
        no_problem = backend.chunked_soft_matching(array[:0], keep_ratio=0.5)
        assert tuple(no_problem.labels.shape) == (0, 0)
        clustering = backend.chunked_soft_matching(array, keep_ratio=0.5)
        assert tuple(clustering.labels.shape) == tuple(clustering.counts.shape) == (2, 0)
        assert tuple(backend.merge(array, clustering).shape) == (2, 0, 4)


@pytest.mark.parametrize("backend", [reference, fast], ids=["reference", "fast"])
def test_an_empty_batch_is_no_error(backend):
    convert = to_torch if backend is fast else np.asarray
    keys = convert(np.ones((0, 64, 4), dtype=np.float32))
    clustering = backend.chunked_soft_matching(keys, keep_ratio=0.5, chunk_size=64)
    assert tuple(backend.merge(keys, clustering).shape) == (0, 32, 4)
    cache = backend.ClusteredCache(keep_ratio=0.5, chunk_size=64, n_recent=0, n_sink=0)
    cache.append(keys, keys)
    assert cache.n_stored == 32


@pytest.mark.parametrize("backend", [reference, fast], ids=["reference", "fast"])
def test_numpy_numbers_are_numbers(backend):
    keys = GOOD if backend is reference else to_torch(GOOD)
    clustering = backend.chunked_soft_matching(keys, keep_ratio=np.float32(0.5), chunk_size=np.int64(2))
    assert tuple(clustering.counts.shape) == (2, 3)


def test_tensors_on_different_devices_are_refused():
    elsewhere = torch.ones(2, 6, 4, device="meta")
    with pytest.raises(ValueError, match="must be on one device"):
        fast.attention(to_torch(GOOD), elsewhere, to_torch(GOOD))


SCALES = (float("nan"), float("inf"), np.float32("nan"), "0.5", 1j, (0.5,), True)


@pytest.mark.parametrize("scale", SCALES, ids=repr)
def test_a_scale_that_is_no_finite_number_is_refused_everywhere(scale):
    rules = {"chunk_size": 2, "n_sink": 0, "n_recent": 0}
    refused = set()
    for package, convert in ((reference, np.copy), (fast, to_torch)):
        good, counts = convert(GOOD), convert(COUNTS)
        clusters = package.kmeans(good, n_clusters=2)
        caches = [
            package.ClusteredCache(keep_ratio=0.5, **rules),
            package.ClusteredCache(keep_ratio=0.5, bits=4, **rules | {"chunk_size": 32}),
            package.RaggedCache(keep_ratios=(0.5, 1.0), **rules),
            package.RecallCache(budget=5, n_sink=0, segment_size=2, tokens_per_cluster=1),
        ]
        for cache in caches:
            cache.append(convert(np.ones((2, 70, 4), dtype=np.float32)), convert(np.ones((2, 70, 4), dtype=np.float32)))
        for attend in (
            functools.partial(package.attention, good, good, good),
            functools.partial(package.clustered_attention, good, good, good, counts),
            functools.partial(package.recall_attention, good, good, good, clusters, budget=3),
            *(functools.partial(cache.attend, good) for cache in caches),
        ):
            refused.add(message(attend, scale=scale))
            for right in (None, 0.25, np.float64(0.25), 1, -0.5):
                attend(scale=right)
    [(_, said)] = refused
    assert said.startswith("scale must be ")
