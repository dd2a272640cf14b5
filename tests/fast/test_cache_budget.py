"""A budget for the clustered cache: never exceeded, the same bytes however tokens arrive, and in NumPy and torch."""

import itertools
import json
import re
import sys

import numpy as np
import pytest
import torch
from agreement import assert_same_bits
from caches import make_cache
from hypothesis import given
from hypothesis import strategies as st
from inputs import DTYPES, KINDS, make_keys, to_torch

from kvcluster import fast, reference
from kvcluster.fast.memory import spans
from kvcluster.reference import span_merging

SMALL = {"keep_ratio": 0.5, "chunk_size": 6, "n_sink": 2, "n_recent": 3, "budget": 25}


def tokens_of(seed, n_tokens, *, dtype="f32", kind="normal"):
    """Keys and values; sums of the first feature of float32 values depend on their order."""
    keys, values = (
        make_keys(kind, (2, n_tokens, 8), DTYPES[dtype], seed),
        make_keys("normal", (2, n_tokens, 5), DTYPES[dtype], seed + 1),
    )
    if dtype == "f32":
        values[..., 0] = np.random.default_rng(seed).choice([1, 1e30, -1e30], values.shape[:-1])
    return keys, values


def pieces(keys, values, cuts, convert):
    for start, stop in itertools.pairwise([0, *sorted(min(cut, keys.shape[1]) for cut in cuts), keys.shape[1]]):
        yield convert(keys[:, start:stop]), convert(values[:, start:stop])


def filled(keys, values, cuts=(), **parameters):
    cache = make_cache(reference, **{**SMALL, **parameters})
    for piece in pieces(keys, values, cuts, np.copy):
        cache.append(*piece)
    return cache


def fast_filled(keys, values, cuts=(), **parameters):
    cache = make_cache(fast, **{**SMALL, **parameters})
    for piece in pieces(keys, values, cuts, to_torch):
        cache.append(*piece)
    return cache


def bits(cache):
    """Keys, values and counts of a cache of either kind, as bytes."""
    arrays = (cache.keys, cache.values, cache.counts)
    if isinstance(cache, fast.ClusteredCache):
        arrays = [array.contiguous().view(torch.uint8).numpy() for array in arrays]
    return [array.tobytes() for array in arrays]


def assert_same_cache(fast_cache, cache):
    for name in ("keys", "values", "counts"):
        assert_same_bits(getattr(fast_cache, name), getattr(cache, name))
    for name in ("n_seen", "n_stored", "n_clustered", "nbytes"):
        assert getattr(fast_cache, name) == getattr(cache, name), name


@pytest.mark.slow
@given(
    n_tokens=st.integers(1, 120),
    cuts=st.lists(st.integers(0, 120), max_size=6),
    keep_ratio=st.sampled_from([1, 0.5, 0.2]),
    chunk_size=st.sampled_from([1, 2, 7, 16]),
    n_sink=st.integers(0, 3),
    n_recent=st.integers(0, 9),
    room=st.integers(0, 60),
    dtype=st.sampled_from(list(DTYPES)),
    kind=st.sampled_from(KINDS),
)
def test_any_split_keeps_the_budget_with_the_same_bytes_in_numpy_and_torch(
    n_tokens, cuts, keep_ratio, chunk_size, n_sink, n_recent, room, dtype, kind
):
    least = n_sink + n_recent + chunk_size - 1 + int(np.ceil(keep_ratio * chunk_size))
    parameters = {"keep_ratio": keep_ratio, "chunk_size": chunk_size, "n_sink": n_sink, "n_recent": n_recent}
    parameters["budget"] = least + room
    keys, values = tokens_of(n_tokens, n_tokens, dtype=dtype, kind=kind)
    whole = filled(keys, values, **parameters)
    assert whole.n_stored <= least + room
    assert (whole.counts.sum(axis=-1) == n_tokens).all()
    for split in (cuts, range(1, n_tokens)):
        other = fast.BoundedCache(**parameters)
        for piece in pieces(keys, values, split, to_torch):
            other.append(*piece)
            assert other.n_stored <= least + room
            assert (other.counts.sum(-1) == other.n_seen).all()
        assert_same_cache(other, whole)
        assert list(other.spans) == whole._spans
    assert bits(filled(keys, values, cuts, **parameters)) == bits(whole)


def test_path_independence_wrong_twin_only_the_end_of_an_append_counts_is_told_apart(monkeypatch):
    """Merging once all chunks of an append are there finds other pairs than merging while they come."""
    keys, values = tokens_of(0, 150)
    by_token = range(1, 150)
    assert bits(fast_filled(keys, values)) == bits(fast_filled(keys, values, by_token))
    right = spans.plan_spans
    monkeypatch.setattr(spans, "plan_spans", lambda held, n, _, now: right(held, n, sys.maxsize, now))
    assert bits(fast_filled(keys, values)) != bits(fast_filled(keys, values, by_token))


def youngest_pair(held):
    together = [older + younger for older, younger in itertools.pairwise(held)]
    return len(together) - 1 - together[::-1].index(min(together))


WRONG = {
    "youngest pair": ("bounded_cache.smallest_pair", lambda right: youngest_pair),
    "two oldest": ("bounded_cache.smallest_pair", lambda right: lambda held: 0),
    "unweighted mean": (
        "span_merging.weighted_mean",
        lambda right: lambda array, counts, labels: right(array, np.ones_like(counts), labels),
    ),
    "sums in descending order": (
        "span_merging.weighted_mean",
        lambda right: lambda *arrays: right(*(array[::-1] for array in arrays)),
    ),
    "sums from +0.0": (
        "span_merging.weighted_mean",
        lambda right: lambda array, *of: right(array + array.dtype.type(0), *of),
    ),
    "one source stays": (
        "span_merging.match_round",
        lambda right: lambda keys, n_merged: np.minimum(right(keys, n_merged - 1), n_merged - 1),
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_twins_of_merging_spans_are_told_apart(name, monkeypatch):
    keys, values = tokens_of(1, 150)
    values[:, 40:, 1] = -0.0
    plans = [{"keep_ratio": 1, "budget": budget} for budget in (25, 90)]
    made = [bits(fast_filled(keys, values, **plan)) for plan in plans]
    assert made == [bits(filled(keys, values, **plan)) for plan in plans]
    place, change = WRONG[name]
    monkeypatch.setattr(f"kvcluster.reference.{place}", change(getattr(span_merging, place.split(".")[1])))
    assert made != [bits(filled(keys, values, **plan)) for plan in plans]


@pytest.mark.parametrize(("package", "convert"), [(reference, np.copy), (fast, to_torch)], ids=["reference", "fast"])
def test_merging_by_hand(package, convert):
    """Spans of one entry: 1 and 2 merge first, the oldest pair; then 3 and 4, the lightest; 5 joins these."""
    tokens = np.arange(1, 6, dtype=np.float32)[:, None]
    cache = package.BoundedCache(keep_ratio=1, chunk_size=1, n_sink=0, n_recent=0, budget=2)
    held = []
    for token in tokens:
        cache.append(convert(token[None]), convert(token[None]))
        held.append((cache.values[:, 0].tolist(), cache.counts.tolist()))
    assert held == [([1], [1]), ([1, 2], [1, 1]), ([1.5, 3], [2, 1]), ([1.5, 3.5], [2, 2]), ([1.5, 4], [2, 3])]


@pytest.mark.parametrize("n_tokens", [1, 24, 25])
def test_within_the_budget_nothing_is_merged(n_tokens):
    keys, values = tokens_of(2, 26)
    for fill, convert in ((filled, np.copy), (fast_filled, to_torch)):
        cache = fill(keys[:, :n_tokens], values[:, :n_tokens], keep_ratio=1)
        assert (cache.keys == convert(keys[:, :n_tokens])).all()
        assert (cache.values == convert(values[:, :n_tokens])).all()
        assert (cache.counts == 1).all()
        cache.append(convert(keys[:, n_tokens:]), convert(values[:, n_tokens:]))
        assert cache.n_stored == 20  # two spans of 6 entries have become one


@pytest.mark.parametrize("parameters", [{}, {"keep_ratio": 0.3}, {"budget": 40}, {"chunk_size": 1, "budget": 6}])
def test_a_budget_never_reached_changes_nothing(parameters):
    keys, values = tokens_of(3, 150, dtype="bf16")
    free = fast_filled(keys, values, [70], **{**parameters, "budget": None})
    assert bits(fast_filled(keys, values, [70], **{**parameters, "budget": 150})) == bits(free)
    assert bits(fast_filled(keys, values, [70], **parameters)) != bits(free)


def test_append_returns_the_entries_before_merging():
    keys, values = tokens_of(4, 90)
    caches = reference.BoundedCache(**SMALL), fast.BoundedCache(**SMALL)
    both = zip(pieces(keys, values, [60], np.copy), pieces(keys, values, [60], to_torch), strict=True)
    for arrays, tensors in both:
        before = caches[0].n_stored
        returned = caches[0].append(*arrays)
        assert returned[0].shape[1] == before + arrays[0].shape[1] > caches[0].n_stored
        for tensor, array in zip(caches[1].append(*tensors), returned, strict=True):
            assert_same_bits(tensor.contiguous(), array)


ROOM = "n_sink + n_recent + chunk_size - 1 + ceil(keep_ratio * chunk_size), got 12 < 2 + 3 + 6 - 1 + 3 = 13"


@pytest.mark.parametrize(
    ("budget", "error", "message"),
    [
        (12, ValueError, f"budget must be at least {ROOM}"),
        (0, ValueError, "budget must be at least 1, got 0"),
        (30.0, TypeError, "budget must be an integer, got 30.0"),
        (True, TypeError, "budget must be an integer, got True"),
    ],
)
def test_both_backends_refuse_a_wrong_budget_with_the_same_words(budget, error, message):
    for package in (reference, fast):
        package.BoundedCache(**{**SMALL, "budget": 13})
        with pytest.raises(error, match=f"^{re.escape(message)}$"):
            package.BoundedCache(**{**SMALL, "budget": budget})


def test_a_refused_append_leaves_the_cache_as_it_was():
    keys, values = tokens_of(5, 60)
    for cache, convert in ((filled(keys, values), np.copy), (fast_filled(keys, values), to_torch)):
        before = bits(cache), cache.n_seen
        with pytest.raises(ValueError, match="values must be finite"):
            cache.append(convert(keys), convert(np.full_like(values, np.nan)))
        assert before == (bits(cache), cache.n_seen)


@pytest.mark.parametrize("budget", [None, 25])
def test_a_restored_cache_continues_as_the_one_that_was_saved(budget):
    keys, values = tokens_of(6, 200)
    cache, restored = (
        fast_filled(keys[:, :97], values[:, :97], budget=budget),
        make_cache(fast, **{**SMALL, "budget": budget}),
    )
    tensors, numbers = cache.state()
    restored.restore(tensors, json.loads(json.dumps(numbers)))
    assert bits(restored) == bits(cache)
    for one in (cache, restored):
        one.append(to_torch(keys[:, 97:]), to_torch(values[:, 97:]))
    assert_same_cache(restored, filled(keys, values, budget=budget))
    assert bits(restored) == bits(cache)


def test_all_merges_are_counted_as_work():
    keys, values = tokens_of(7, 150)
    free, bounded = fast_filled(keys, values, budget=None), fast_filled(keys, values)
    n_merges = (free.n_body - bounded.n_body) // 3
    assert n_merges == len(free.spans) - len(bounded.spans) > 10
    assert bounded.work.n_rows == free.work.n_rows + n_merges * 3 * 2  # sources of a merge, heads
    assert bounded.work.n_scored_rows <= bounded.work.n_rows


def test_memory_is_bounded_by_the_budget():
    keys, values = tokens_of(8, 3000)
    cache, of_entry = fast_filled(keys, values, [2500]), 2 * (8 * 4 + 5 * 4 + 4)
    assert cache.nbytes == cache.n_stored * of_entry <= 25 * of_entry
    assert cache.nbytes_reserved <= (25 + 2 * 6) * of_entry
