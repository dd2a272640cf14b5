"""The online cache: the same bytes however the tokens arrive, and in NumPy and torch."""

import itertools

import numpy as np
import pytest
import torch
from agreement import assert_same_bits, attention_agrees, equal_in_float64
from hypothesis import given
from hypothesis import strategies as st
from inputs import DTYPES, KINDS, make_keys, to_numpy, to_torch

from kvcluster import fast, reference

PARAMETERS = {"keep_ratio": 0.3, "chunk_size": 10, "n_sink": 3, "n_recent": 7}


def tokens_of(seed, n_tokens, *, dtype="f32", kind="normal"):
    keys = make_keys(kind, (2, n_tokens, 8), DTYPES[dtype], seed)
    return keys, make_keys("normal", (2, n_tokens, 6), DTYPES[dtype], seed + 1)


def filled(keys, values, cuts=(), **parameters):
    """A reference cache that was given the tokens in pieces, cut at `cuts`."""
    cache = reference.ClusteredCache(**{**PARAMETERS, **parameters})
    for start, stop in itertools.pairwise([0, *sorted(cuts), keys.shape[-2]]):
        cache.append(keys[..., start:stop, :], values[..., start:stop, :])
    return cache


def assert_same_cache(fast_cache, cache):
    for name in ("keys", "values", "counts"):
        assert_same_bits(getattr(fast_cache, name), getattr(cache, name))
    for name in ("n_seen", "n_stored", "n_clustered", "nbytes"):
        assert getattr(fast_cache, name) == getattr(cache, name), name


@pytest.mark.parametrize(
    ("recent_share", "n_recent", "least"), [(0.3, 7, 36), (0.3, 50, 50), (0.0, 7, 7), (0.5, 0, 60)]
)
def test_the_recent_window_grows_with_the_text(recent_share, n_recent, least):
    """Of 120 tokens, 3 of them sinks."""
    keys, values = tokens_of(0, 120)
    parameters = PARAMETERS | {"n_recent": n_recent, "recent_share": recent_share}
    for cache, convert in (
        (reference.ClusteredCache(**parameters), np.asarray),
        (fast.ClusteredCache(**parameters), to_torch),
    ):
        cache.append(convert(keys), convert(values))
        n_clustered = (117 - least) // 10 * 10
        assert cache.n_clustered == n_clustered
        assert least <= 117 - n_clustered < least + 10
        n_tail = 117 - n_clustered
        assert_same_bits(torch.as_tensor(cache.keys[:, -n_tail:]), keys[:, -n_tail:])
    for share, message in (
        (0.6, "recent_share must be at most 0.5, got 0.6"),
        (-0.1, r"recent_share must be in \[0, 1\]"),
    ):
        for package in (reference, fast):
            with pytest.raises(ValueError, match=message):
                package.ClusteredCache(**PARAMETERS, recent_share=share)


@given(
    n_tokens=st.integers(1, 120),
    cuts=st.lists(st.integers(0, 120), max_size=6),
    keep_ratio=st.sampled_from([1, 0.5, 0.25, 0.2, 0.01]),
    chunk_size=st.sampled_from([1, 2, 10, 16]),
    n_sink=st.integers(0, 5),
    n_recent=st.integers(0, 20),
    recent_share=st.sampled_from([0.0, 0.5]) | st.floats(0, 0.5),
    dtype=st.sampled_from(list(DTYPES)),
    kind=st.sampled_from(KINDS),
)
def test_any_split_gives_the_same_bytes_in_numpy_and_torch(
    n_tokens, cuts, keep_ratio, chunk_size, n_sink, n_recent, recent_share, dtype, kind
):
    parameters = {"keep_ratio": keep_ratio, "chunk_size": chunk_size, "n_sink": n_sink, "n_recent": n_recent}
    parameters["recent_share"] = recent_share
    keys, values = tokens_of(n_tokens, n_tokens, dtype=dtype, kind=kind)
    cuts = [min(cut, n_tokens) for cut in cuts]
    whole = filled(keys, values, **parameters)
    by_token = fast.ClusteredCache(**parameters)
    for token in range(n_tokens):
        by_token.append(to_torch(keys[:, token : token + 1]), to_torch(values[:, token : token + 1]))
    assert_same_cache(by_token, whole)
    split = filled(keys, values, cuts, **parameters)
    assert split.keys.tobytes() == whole.keys.tobytes()
    assert split.values.tobytes() == whole.values.tobytes()
    assert np.array_equal(split.counts, whole.counts)


def test_path_independence_wrong_twin_chunks_from_the_end_is_told_apart(monkeypatch):
    """A cache that took its chunks from just before the recent tokens would hold what depends on the split."""
    right = reference.ClusteredCache._cluster_what_is_due

    def from_the_end(cache):
        unclustered = cache.n_seen - cache.n_sink - cache.n_clustered
        leaving = max(0, unclustered - cache.n_recent) // cache.chunk_size * cache.chunk_size
        cache._n_body = cache.n_stored - leaving - cache.n_recent - cache.n_sink
        right(cache)

    keys, values = tokens_of(0, 105)  # 95 tokens between sinks and recent ones: no whole number of chunks
    by_token = range(1, 105)
    assert filled(keys, values).keys.tobytes() == filled(keys, values, by_token).keys.tobytes()
    monkeypatch.setattr(reference.ClusteredCache, "_cluster_what_is_due", from_the_end)
    whole, split = filled(keys, values), filled(keys, values, by_token)
    assert whole.n_stored == split.n_stored
    for name in ("keys", "values"):
        assert getattr(whole, name).tobytes() != getattr(split, name).tobytes(), name


@given(n_tokens=st.integers(1, 200))
def test_sinks_and_recent_tokens_stay_exact_and_every_token_counts(n_tokens):
    keys, values = tokens_of(3, n_tokens)
    cache = filled(keys, values)
    n_recent = n_tokens - cache.n_clustered - min(3, n_tokens)
    assert cache.n_seen == n_tokens
    assert np.array_equal(cache.keys[:, :3], keys[:, :3])
    assert np.array_equal(cache.values[:, :3], values[:, :3])
    if n_recent:
        assert np.array_equal(cache.keys[:, -n_recent:], keys[:, -n_recent:])
        assert np.array_equal(cache.values[:, -n_recent:], values[:, -n_recent:])
    assert n_tokens <= 10 or 7 <= n_recent < 17
    assert (cache.counts.sum(axis=-1) == n_tokens).all()


def test_the_body_is_chunked_soft_matching_of_its_tokens():
    keys, values = tokens_of(4, 100, dtype="bf16")
    cache = filled(keys, values)
    body = slice(3, 3 + cache.n_clustered)
    clustering = reference.chunked_soft_matching(keys[:, body], keep_ratio=0.3, chunk_size=10)
    entries = slice(3, 3 + clustering.counts.shape[-1])
    for held, tokens in ((cache.keys, keys), (cache.values, values)):
        centroids = reference.merge(tokens[:, body], clustering).astype(keys.dtype)
        assert held[:, entries].tobytes() == centroids.tobytes()


def test_keep_ratio_one_is_full_attention():
    keys, values = tokens_of(5, 100)
    query = make_keys("normal", (2, 3, 8), DTYPES["f32"], seed=6)
    full = reference.attention(query, keys, values)
    assert equal_in_float64(filled(keys, values, keep_ratio=1).attend(query), full)
    assert not equal_in_float64(filled(keys, values).attend(query), full)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attend_is_clustered_attention_to_the_entries(dtype):
    keys, values = tokens_of(7, 300, dtype=dtype)
    query = to_torch(make_keys("normal", (2, 3, 8), DTYPES[dtype], seed=8))
    cache = fast.ClusteredCache(**PARAMETERS)
    cache.append(to_torch(keys), to_torch(values))
    held = cache.keys, cache.values, cache.counts
    assert attention_agrees(cache.attend(query), query, *held)
    assert not attention_agrees(fast.attention(query, *held[:2]), query, *held)


def test_append_returns_what_new_tokens_may_attend_to():
    keys, values = tokens_of(9, 60)
    cache = filled(keys[:, :40], values[:, :40])
    held = cache.keys
    seen_keys, seen_values, counts = cache.append(keys[:, 40:], values[:, 40:])
    assert np.array_equal(seen_keys, np.concatenate([held, keys[:, 40:]], axis=1))
    assert seen_values.shape[1] == counts.shape[1] == held.shape[1] + 20
    assert cache.n_stored < seen_keys.shape[1]


@pytest.mark.parametrize("backend", [reference, fast], ids=["reference", "fast"])
def test_a_refused_append_leaves_the_cache_as_it_was(backend):
    convert = to_torch if backend is fast else np.copy
    back = to_numpy if backend is fast else np.asarray
    keys, values = tokens_of(10, 50)
    cache = backend.ClusteredCache(**PARAMETERS)
    cache.append(convert(keys), convert(values))
    before = back(cache.keys).tobytes(), cache.n_seen, cache.n_stored, cache.nbytes
    bad = values.copy()
    bad[0, 0, 0] = np.nan
    for new_keys, new_values, message in (
        (keys, bad, "values must be finite"),
        (keys[:1], values[:1], "keys must fit what the cache holds"),
        (keys[..., :4], values, "keys must fit what the cache holds"),
        (keys, values[..., :4], "values must fit what the cache holds"),
        (keys, values[:, :7], "values must have the leading axes and tokens of keys"),
        (keys, values.astype(np.float16), "values must have the dtype of the cache, float32"),
        (keys.astype(np.float16), values.astype(np.float16), "keys must have the dtype of the cache, float32"),
    ):
        with pytest.raises(ValueError, match=message):
            cache.append(convert(new_keys), convert(new_values))
    assert before == (back(cache.keys).tobytes(), cache.n_seen, cache.n_stored, cache.nbytes)


@pytest.mark.parametrize("backend", [reference, fast], ids=["reference", "fast"])
def test_the_cache_does_not_share_memory_with_what_it_was_given(backend):
    convert = to_torch if backend is fast else np.copy
    keys, values = (convert(array) for array in tokens_of(11, 5))
    cache = backend.ClusteredCache(**PARAMETERS)
    cache.append(keys, values)
    keys[:] = 0
    assert (cache.keys != 0).any()


def test_the_fast_cache_holds_no_memory_but_its_entries_and_some_room():
    """No view keeps a larger tensor alive: nbytes_reserved asks the storages."""
    keys, values = tokens_of(12, 1000)
    cache = fast.ClusteredCache(**PARAMETERS)
    cache.append(to_torch(keys)[:, :999], to_torch(values)[:, :999])
    of_entry = 2 * (8 * 4 + 6 * 4 + 4)
    assert cache.nbytes == cache.n_stored * of_entry
    room = max(PARAMETERS["chunk_size"], cache.n_stored // 32)
    assert cache.nbytes < cache.nbytes_reserved <= (cache.n_stored + 2 * room) * of_entry


def test_appending_and_clustering_copy_no_body(monkeypatch):
    """Token by token, what is written is the tokens, the chunks and the recent window, but for rare moves."""
    keys, values = (to_torch(array) for array in tokens_of(13, 3000))
    cache = fast.ClusteredCache(keep_ratio=0.2, chunk_size=16, n_sink=2, n_recent=8)
    cache.append(keys[:, :2000], values[:, :2000])
    places = []
    for token in range(2000, 3000):
        cache.append(keys[:, token : token + 1], values[:, token : token + 1])
        places.append(cache.keys.data_ptr())
    moves = sum(before != after for before, after in itertools.pairwise(places))
    assert moves <= 12  # 256 entries more, after each move room for 16 or more
    whole = fast.ClusteredCache(keep_ratio=0.2, chunk_size=16, n_sink=2, n_recent=8)
    whole.append(keys, values)
    assert torch.equal(cache.keys, whole.keys)


def test_what_append_returns_is_from_before_the_clustering():
    keys, values = (to_torch(array) for array in tokens_of(14, 100))
    cache = fast.ClusteredCache(**PARAMETERS)
    assert all(map(torch.equal, cache.append(keys, values), (keys, values, torch.ones(2, 100, dtype=torch.int32))))
    assert cache.n_stored < 100


def test_an_empty_cache_answers():
    for backend in (reference, fast):
        cache = backend.ClusteredCache(keep_ratio=0.5)
        assert (cache.n_seen, cache.n_stored, cache.nbytes) == (0, 0, 0)
        with pytest.raises(ValueError, match="attend needs at least one appended token"):
            cache.attend(None)
