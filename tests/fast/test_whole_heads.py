"""Heads that keep every token beside heads that are clustered, by any method: bit for bit, and as memory."""

import numpy as np
import pytest
import torch
from agreement import assert_same_bits, attention_agrees
from hypothesis import given
from hypothesis import strategies as st
from inputs import DTYPES, make_keys, to_torch

from kvcluster import fast, reference

SMALL = {"keep_ratio": 0.3, "chunk_size": 10, "n_sink": 3, "n_recent": 7}
HELD = ("keys", "values", "counts", "whole_keys", "whole_values")


def tokens_of(n_tokens, *, lead=(1, 4), dtype="f32", seed=0):
    return [make_keys("smooth", (*lead, n_tokens, dim), DTYPES[dtype], seed + dim) for dim in (8, 6)]


def both(method, pieces, tokens, **plan):
    """The cache of the reference and that of `fast`, after the same appends."""
    caches = []
    for package, convert in ((reference, np.asarray), (fast, to_torch)):
        cache = package.ClusteredCache(**SMALL, method=getattr(package, method)(), **plan)
        start = 0
        for piece in pieces:
            cache.append(*(convert(np.ascontiguousarray(x[..., start : start + piece, :])) for x in tokens))
            start += piece
        caches.append(cache)
    return caches


@given(
    method=st.sampled_from(["SoftMatching", "Distinctive"]),
    pieces=st.lists(st.integers(0, 60), min_size=1, max_size=5),
    whole_heads=st.sampled_from([(0,), (3, 1), (0, 1, 2, 3), ()]),
    dtype=st.sampled_from(list(DTYPES)),
)
def test_any_split_gives_the_same_bytes_in_numpy_and_torch(method, pieces, whole_heads, dtype):
    tokens = tokens_of(sum(pieces), dtype=dtype)
    theirs, ours = both(method, pieces, tokens, whole_heads=whole_heads)
    at_once, _ = both(method, [sum(pieces)], tokens, whole_heads=whole_heads)
    for name in HELD:
        expected = getattr(theirs, name)
        if expected is None:
            assert getattr(ours, name) is None, name
            continue
        assert_same_bits(getattr(ours, name), expected)
        assert expected.tobytes() == getattr(at_once, name).tobytes(), name
    assert (ours.nbytes, ours.n_stored, ours.n_seen) == (theirs.nbytes, theirs.n_stored, theirs.n_seen)


@pytest.mark.parametrize("method", ["SoftMatching", "Distinctive"])
def test_the_other_heads_are_those_of_a_cache_without_the_whole_ones(method):
    tokens = tokens_of(90)
    _, cache = both(method, [90], tokens, whole_heads=(2,))
    _, alone = both(method, [90], [x[:, [0, 1, 3]] for x in tokens])
    _, wrong = both(method, [90], [x[:, [0, 1, 2]] for x in tokens])  # the wrong twin leaves out another head
    for name in ("keys", "values", "counts"):
        assert torch.equal(getattr(cache, name), getattr(alone, name))
    assert not torch.equal(cache.keys, wrong.keys)
    assert_same_bits(cache.whole_keys, tokens[0][:, [2]])
    assert_same_bits(cache.whole_values, tokens[1][:, [2]])


def test_memory_is_that_of_two_rectangles():
    tokens = tokens_of(1000)
    _, cache = both("SoftMatching", [1000], tokens, whole_heads=(1,))
    entry, token = 4 * (8 + 6 + 1), 4 * (8 + 6)  # float32 numbers, an int32 count
    assert cache.nbytes == 3 * cache.n_stored * entry + 1000 * token
    assert cache.nbytes < cache.nbytes_reserved < 1.1 * cache.nbytes + 5000
    assert cache.mean_entries == (3 * cache.n_stored + 1000) / 4


@pytest.mark.parametrize("lead", [(4,), (2, 4), (2, 3, 4)], ids=str)
def test_attend_is_attention_of_each_head_to_what_it_keeps(lead):
    tokens = tokens_of(90, lead=lead)
    theirs, cache = both("SoftMatching", [50, 40], tokens, whole_heads=(0, 2))
    query = to_torch(make_keys("normal", (*lead, 3, 8), DTYPES["f32"], 9))
    keys, values, counts = cache.entries()
    for ours, reference_entries in zip((keys, values, counts), theirs.entries(), strict=True):
        assert_same_bits(ours, reference_entries)
    assert attention_agrees(cache.attend(query), query, keys, values, counts)
    swapped = keys[..., [2, 1, 0, 3], :, :]  # the wrong twin: heads in another order
    assert not attention_agrees(cache.attend(query), query, swapped, values, counts)


def test_append_returns_the_entries_before_the_clustering_of_all_heads():
    tokens = tokens_of(60)
    cache = fast.ClusteredCache(**SMALL, whole_heads=(3,))
    keys, values, counts = cache.append(*map(to_torch, tokens))
    assert_same_bits(keys, tokens[0])
    assert_same_bits(values, tokens[1])
    assert bool((counts == 1).all())
    more = tokens_of(5, seed=50)
    keys, _, counts = cache.append(*map(to_torch, more))
    assert keys.shape == (1, 4, 65, 8)
    assert_same_bits(keys[:, :, -5:], more[0])
    assert counts.sum(-1).tolist() == [[65] * 4]
    assert_same_bits(keys[:, 3:, :60], tokens[0][:, 3:])


def test_rows_states_and_crops_keep_whole_heads():
    tokens = tokens_of(70, lead=(2, 4))
    _, cache = both("SoftMatching", [60, 10], tokens, whole_heads=(1, 2))
    restored = fast.ClusteredCache(**SMALL, whole_heads=(1, 2))
    restored.restore(*cache.state())
    for each in (cache, restored):
        each.select(torch.tensor([1, 0, 1]))
    assert_same_bits(restored.whole_keys, tokens[0][[1, 0, 1]][:, [1, 2]])
    cache.crop(4)
    _, expected = both("SoftMatching", [60, 6], [x[[1, 0, 1]] for x in tokens], whole_heads=(1, 2))
    for name in HELD:
        assert torch.equal(getattr(cache, name), getattr(expected, name)), name


@pytest.mark.parametrize(
    ("whole_heads", "error", "message"),
    [
        ((-1,), ValueError, "whole_heads must be at least 0, got -1"),
        ((1, 1), ValueError, r"whole_heads must be different heads, got \[1, 1\]"),
        ((0.5,), TypeError, "whole_heads must be an integer, got 0.5"),
        (2, TypeError, "whole_heads must be a sequence of integers, got 2"),
        ("12", TypeError, "whole_heads must be a sequence of integers, got '12'"),
    ],
    ids=str,
)
def test_both_refuse_what_are_no_heads(whole_heads, error, message):
    for package in (reference, fast):
        with pytest.raises(error, match=message):
            package.ClusteredCache(**SMALL, whole_heads=whole_heads)


def test_both_refuse_heads_that_keys_do_not_have_and_stay_as_they_were():
    for package, convert in ((reference, np.asarray), (fast, to_torch)):
        cache = package.ClusteredCache(**SMALL, whole_heads=(4,))
        with pytest.raises(
            ValueError, match=r"whole_heads must be below the heads of keys, 4, got 4 for keys of shape"
        ):
            cache.append(*map(convert, tokens_of(5)))
        with pytest.raises(ValueError, match=r"whole_heads must be below the heads of keys, 0, got 4"):
            cache.append(*(convert(x[0, 0]) for x in tokens_of(5)))
        assert cache.n_seen == 0
        cache = package.ClusteredCache(**SMALL, whole_heads=(1,))
        cache.append(*map(convert, tokens_of(5)))
        with pytest.raises(
            ValueError, match=r"keys must fit what the cache holds, got \(1, 3, 5, 8\) after \(1, 4, 5, 8\)"
        ):
            cache.append(*(convert(np.ascontiguousarray(x[:, :3])) for x in tokens_of(5)))
        with pytest.raises(ValueError, match="query must have the leading axes and dim of keys"):
            cache.attend(convert(tokens_of(5)[0][:, :3]))
        assert cache.n_seen == 5
