"""A default device other than that of the tensors changes nothing; views that torch holds negated are read right."""

import dataclasses

import pytest
import torch
from agreement import equal_in_float32
from inputs import make_keys, to_numpy

from kvcluster import fast
from kvcluster.fast.memory.segments import RecallSettings
from kvcluster.fast.tiers import TieredRecallCache

SIZES = {"chunk_size": 64, "n_sink": 4, "n_recent": 40}
RECALL = {"budget": 60, "n_sink": 4, "tokens_per_cluster": 16, "segment_size": 32}
EVEN, UNEVEN = {"keep_ratio": 0.3} | SIZES, {"keep_ratios": (0.3, 0.5, 1.0)} | SIZES
SOFT, DISTINCTIVE, ATTENDED = fast.SoftMatching(), fast.Distinctive(n_shared=2), fast.Attended(n_shared=2)
CACHES = {
    "soft": lambda: fast.ClusteredCache(**EVEN, method=SOFT),
    "distinctive": lambda: fast.ClusteredCache(**EVEN, method=DISTINCTIVE),
    "attended": lambda: fast.ClusteredCache(**EVEN, method=ATTENDED),
    "soft in 4 bits": lambda: fast.ClusteredCache(**EVEN, method=SOFT, bits=4),
    "attended in 4 bits": lambda: fast.ClusteredCache(**EVEN, method=ATTENDED, bits=4),
    "whole heads": lambda: fast.ClusteredCache(**EVEN, whole_heads=(1,)),
    "ragged soft": lambda: fast.RaggedCache(**UNEVEN, method=SOFT),
    "ragged distinctive": lambda: fast.RaggedCache(**UNEVEN, method=DISTINCTIVE, bits=4),
    "ragged attended": lambda: fast.RaggedCache(**UNEVEN, method=ATTENDED),
    "bounded": lambda: fast.BoundedCache(budget=200, keep_ratio=0.5, **SIZES),
    "chelsea": lambda: fast.ChelseaCache(ratio=0.5, max_new_tokens=80, **SIZES),
    "recall": lambda: fast.RecallCache(**RECALL),
    "recall in 4 bits": lambda: fast.RecallCache(**RECALL, bits=4),
    "tiers": lambda: TieredRecallCache(RecallSettings(**RECALL)),
}


def drawn(n_tokens, seed):
    return torch.from_numpy(make_keys("smooth", (2, 3, n_tokens, 16), "f4", seed))


KEYS, VALUES, QUERY = drawn(300, 0), drawn(300, 1), drawn(2, 2)
QUERIES = torch.stack([KEYS, VALUES], dim=2)
COUNTS = torch.full((2, 3, 300), 2, dtype=torch.int32)


def from_cache(name):
    cache = CACHES[name]()
    for span in (slice(0, 300), slice(0, 40)):
        arrays = [KEYS[..., span, :], VALUES[..., span, :]]
        cache.append(*arrays, *([QUERIES[..., span, :]] if "attended" in name else []))
    outputs = [cache.attend(QUERY)]
    cache.crop(3)
    return [*outputs, cache.attend(QUERY), *([] if "settings" in vars(cache) else cache.entries())]


def recalled():
    clusters = fast.kmeans(KEYS, n_clusters=10)
    selection = fast.select_clusters(QUERY, clusters.centroids, clusters.counts, budget=60)
    return clusters, selection, fast.recall_attention(QUERY, KEYS, VALUES, clusters, budget=60)


def matched(match, *arrays):
    clustering = match(*arrays, keep_ratio=0.3, chunk_size=64)
    return clustering, fast.merge(VALUES, clustering)


FUNCTIONS = {
    "attention": lambda: fast.attention(QUERY, KEYS, VALUES),
    "clustered_attention": lambda: fast.clustered_attention(QUERY, KEYS, VALUES, COUNTS),
    "chunked_soft_matching": lambda: matched(fast.chunked_soft_matching, KEYS),
    "distinctive_matching": lambda: matched(fast.distinctive_matching, KEYS, VALUES),
    "attended_matching": lambda: matched(fast.attended_matching, KEYS, VALUES, drawn(8, 3).unflatten(2, (4, 2))),
    "quantize": lambda: (made := fast.quantize(KEYS, bits=4), fast.dequantize(made, 16)),
    "similarity": lambda: fast.similarity(KEYS, VALUES),
    "recall": recalled,
}  # fmt: skip
CALLS = FUNCTIONS | {f"{name} cache": lambda name=name: from_cache(name) for name in CACHES}


def tensors_of(made):
    if isinstance(made, torch.Tensor):
        return [made]
    if dataclasses.is_dataclass(made):
        made = [getattr(made, field.name) for field in dataclasses.fields(made)]
    return [tensor for part in made for tensor in tensors_of(part)] if isinstance(made, tuple | list) else []


def equal(ours, theirs):
    return len(ours) == len(theirs) and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("name", CALLS)
def test_what_is_made_lies_where_the_tensors_do(name):
    expected = tensors_of(CALLS[name]())
    with torch.device("meta"):
        made = tensors_of(CALLS[name]())
    assert expected
    assert {tensor.device.type for tensor in made} == {"cpu"}
    assert equal(made, expected)


def alike(ours, theirs):
    """Equal, but for the rounding of another backend's attention."""
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if not torch.equal(a, b)]
    return all(a.dtype == torch.float32 and equal_in_float32(to_numpy(a), to_numpy(b)) for a, b in pairs)


@pytest.mark.parametrize("name", CALLS)
def test_a_negated_view_is_what_it_shows(name, monkeypatch):
    expected = tensors_of(CALLS[name]())
    shown = torch._neg_view(-KEYS)
    assert shown.is_neg()
    monkeypatch.setitem(globals(), "KEYS", shown)
    assert alike(tensors_of(CALLS[name]()), expected)
    monkeypatch.setitem(globals(), "KEYS", -shown)
    if not name.endswith("matching"):  # which knows no sign of all keys
        assert not alike(tensors_of(CALLS[name]()), expected)
