"""Tensors that are no rows of numbers, and integers of other kinds: a clear error by name, or the right value."""

import copy
import pickle
from fractions import Fraction

import numpy as np
import pytest
import torch
from caches import make_tiered
from torch._subclasses import FakeTensorMode

from kvcluster import fast, reference

KEYS = torch.randn(2, 60, 8, generator=torch.Generator().manual_seed(0))
SIZES = {"chunk_size": 16, "n_sink": 2, "n_recent": 4}
RECALL = {"budget": 30, "n_sink": 2, "segment_size": 10}
CACHES = {
    "clustered": lambda: fast.ClusteredCache(keep_ratio=0.5, **SIZES),
    "ragged": lambda: fast.RaggedCache(keep_ratios=(0.3, 0.5), **SIZES),
    "chelsea": lambda: fast.ChelseaCache(ratio=0.5, max_new_tokens=0, **SIZES),
    "recall": lambda: fast.RecallCache(**RECALL),
    "tiered": lambda: make_tiered(**RECALL),
}


def nested(layout):
    return torch.nested.nested_tensor([torch.randn(3, 8), torch.randn(4, 8)], layout=layout)


KINDS = {  # words of the error, and a tensor of this kind
    "sparse_coo": lambda: KEYS.to_sparse(),
    "sparse_csr": lambda: KEYS[0].to_sparse_csr(),
    "nested": lambda: nested(torch.strided),
    "nested ": lambda: nested(torch.jagged),
    "masked": lambda: torch.masked.masked_tensor(KEYS, KEYS > 0),
    "_mkldnn": lambda: KEYS.to_mkldnn(),
    "meta": lambda: KEYS.to("meta"),
    "fake": lambda: FakeTensorMode().from_tensor(KEYS),
}
COUNTS = torch.ones(2, 60, dtype=torch.int32)
FUNCTIONS = {
    "attention": lambda x: fast.attention(x, x, x),
    "clustered_attention": lambda x: fast.clustered_attention(x, x, x, COUNTS),
    "similarity": lambda x: fast.similarity(x, x),
    "kmeans": lambda x: fast.kmeans(x, n_clusters=5),
    "quantize": lambda x: fast.quantize(x, bits=4),
    "distinctive_matching": lambda x: fast.distinctive_matching(x, x, keep_ratio=0.5, chunk_size=16),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_tensors_that_are_no_rows_of_numbers_are_refused_by_name(kind):
    wrong = KINDS[kind]()
    words = "with numbers in memory" if kind in ("meta", "fake") else "dense"
    for function in FUNCTIONS.values():
        with pytest.raises(ValueError, match=rf"must be a (dense )?tensor.*, got a {kind.strip()} one") as error:
            function(wrong)
        assert words in str(error.value)
    for make in CACHES.values():
        cache = make()
        with pytest.raises(ValueError, match=rf"keys must be a .*, got a {kind.strip()} one"):
            cache.append(wrong, wrong)
        assert cache.n_seen == 0
        cache.append(KEYS, KEYS)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "int32", "int64", "uint16", "uint32"])
def test_labels_and_counts_of_any_integers_give_the_same(dtype):
    arrays = KEYS.numpy()
    made = reference.chunked_soft_matching(arrays, keep_ratio=0.5, chunk_size=16)
    labels, counts = made.labels.astype(dtype), made.counts.astype(dtype)
    expected = reference.merge(arrays, made)
    assert reference.merge(arrays, reference.Clustering(labels, counts)).tobytes() == expected.tobytes()
    ours = fast.merge(KEYS, fast.Clustering(torch.from_numpy(labels), torch.from_numpy(counts)))
    assert ours.numpy().tobytes() == expected.tobytes()


@pytest.mark.parametrize("dtype", ["float32", "bool", "complex64"])
def test_labels_that_are_no_integers_are_refused_with_the_same_words(dtype):
    arrays = KEYS.numpy()
    made, found = reference.chunked_soft_matching(arrays, keep_ratio=0.5, chunk_size=16), reference.kmeans
    clusters = found(arrays, n_clusters=5)
    said = set()
    for package, convert in ((reference, np.asarray), (fast, torch.from_numpy)):
        x, wrong = convert(arrays.copy()), convert(made.labels.astype(dtype))
        of_clusters = package.Clusters(
            convert(clusters.labels.astype(dtype)), convert(clusters.counts), convert(clusters.centroids)
        )
        for call in (
            lambda package=package, x=x, wrong=wrong: package.merge(x, package.Clustering(wrong, wrong)),
            lambda package=package, x=x, of=of_clusters: package.recall_attention(x[:, :2], x, x, of, budget=20),
        ):
            with pytest.raises(ValueError, match=f"must be integers, got {dtype}") as error:
                call()
            said.add(str(error.value))
    assert len(said) == 2


def test_labels_elsewhere_are_refused():
    labels = torch.zeros(2, 60, dtype=torch.int64, device="meta")
    with pytest.raises(ValueError, match="labels must be on the device of what they belong to, cpu, got meta"):
        fast.merge(KEYS, fast.Clustering(labels, torch.full((2, 1), 60)))


WRONG_ROWS = {
    "list": [1, 0],
    "array": np.array([1, 0]),
    "floats": torch.tensor([1.0, 0.0]),
    "booleans": torch.tensor([True, False]),
    "two axes": torch.tensor([[1, 0]]),
    "too many": torch.tensor([0, 2]),
    "negative": torch.tensor([-1]),
}


@pytest.mark.parametrize("wrong", WRONG_ROWS)
@pytest.mark.parametrize("kind", CACHES)
def test_rows_that_are_not_there_are_refused_and_nothing_is_lost(kind, wrong):
    cache, keys = CACHES[kind](), torch.stack([KEYS, -KEYS])
    cache.append(keys, keys)
    before = copy.deepcopy(cache)
    with pytest.raises((TypeError, ValueError), match="indices must be "):
        cache.select(WRONG_ROWS[wrong])
    query = keys[:, :, :2]
    assert torch.equal(cache.attend(query), before.attend(query))
    cache.select(torch.tensor([1, 0], dtype=torch.int32))
    assert torch.equal(cache.attend(query.flip(0)), before.attend(query).flip(0))


@pytest.mark.parametrize("kind", ["whole heads", "ragged"])
def test_heads_that_are_not_alike_are_not_taken_for_rows(kind):
    whole = fast.ClusteredCache(keep_ratio=0.5, whole_heads=(1,), **SIZES)
    cache = whole if kind == "whole heads" else CACHES[kind]()
    cache.append(KEYS, KEYS)
    before = cache.attend(KEYS[:, :2])
    with pytest.raises(ValueError, match="select needs an axis of rows before that of heads in keys, got"):
        cache.select(torch.tensor([0, 0]))
    assert torch.equal(cache.attend(KEYS[:, :2]), before)


@pytest.mark.parametrize("wrong", ["1", 1.0, None, True, torch.tensor(1)])
@pytest.mark.parametrize("kind", CACHES)
def test_crop_takes_integers_alone(kind, wrong):
    cache = CACHES[kind]()
    cache.append(KEYS, KEYS)
    with pytest.raises(TypeError, match="n_tokens must be an integer, got "):
        cache.crop(wrong)
    cache.crop(np.uint8(1))
    assert cache.n_seen == 59


@pytest.mark.parametrize("kind", ["clustered", "ragged", "chelsea", "recall"])
def test_a_cache_of_one_layer_can_be_pickled_and_copied(kind):
    cache = CACHES[kind]()
    cache.append(KEYS, KEYS)
    for other in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        other.append(KEYS[:, :9], KEYS[:, :9])
        assert other.n_seen == 69
    assert cache.n_seen == 60


@pytest.mark.parametrize("package", [reference, fast], ids=["reference", "fast"])
def test_fractions_are_numbers(package):
    settings = package.RecallCache(**RECALL, spread=Fraction(1, 2))
    assert type(settings.spread if package is reference else settings.settings.spread) is float
    assert package.ClusteredCache(keep_ratio=Fraction(1, 4)).keep_ratio == 0.25


def test_arrays_of_another_byte_order_are_refused_by_the_reference():
    keys = KEYS.numpy()
    turned = keys.astype(keys.dtype.newbyteorder())
    rule = f"keys must be float16, bfloat16 or float32, got {turned.dtype.str}"
    for call in (
        lambda: reference.chunked_soft_matching(turned, keep_ratio=0.5),
        lambda: reference.attention(keys[:, :1], turned, keys),
        lambda: reference.ClusteredCache(keep_ratio=0.5).append(turned, keys),
        lambda: reference.kmeans(turned, n_clusters=3),
    ):
        with pytest.raises(ValueError, match=rule):
            call()
