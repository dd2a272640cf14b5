"""Whole heads keep every token, in caches of every kind; the other heads do as if they were alone."""

import itertools
import re

import numpy as np
import pytest
from agreement import equal_in_float64
from inputs import DTYPES, make_keys

from kvcluster.reference import ChelseaCache, ClusteredCache, Distinctive, attention, clustered_attention
from kvcluster.reference.whole_heads import apart, together

WHOLE, OTHERS = (3, 1), [0, 2, 4]
CLUSTERED = {"keep_ratio": 0.4, "chunk_size": 10, "n_sink": 3, "n_recent": 5}
CACHES = {
    "soft matching": lambda heads: ClusteredCache(**CLUSTERED, whole_heads=heads),
    "distinctive": lambda heads: ClusteredCache(**CLUSTERED, method=Distinctive(n_shared=2), whole_heads=heads),
    "chelsea": lambda heads: ChelseaCache(
        ratio=0.3, max_new_tokens=9, interval=2, chunk_size=6, n_sink=3, n_recent=5, whole_heads=heads
    ),
}
ALL_CACHES = pytest.mark.parametrize("kind", CACHES)


def tokens(dtype="f32", kind="normal", heads=5):
    return [make_keys(kind, (2, heads, 71, dim), DTYPES[dtype], seed=dim) for dim in (8, 6)]


def filled(kind, whole_heads, keys, values, pieces=(50, 1, 20)):
    cache = CACHES[kind](whole_heads)
    for start, stop in itertools.pairwise(itertools.accumulate((0, *pieces))):
        returned = cache.append(keys[..., start:stop, :], values[..., start:stop, :])
    return cache, returned


def held(cache):
    return [array.tobytes() for array in (cache.keys, cache.values, cache.counts)]


@ALL_CACHES
@pytest.mark.parametrize("values_of", ["normal", "tiny", "zeros"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_whole_heads_keep_every_token_bit_for_bit(kind, dtype, values_of):
    keys, values = tokens(dtype, values_of)
    keys[..., 0] = -0.0
    cache, _ = filled(kind, WHOLE, keys, values)
    assert cache.whole_heads == (1, 3)
    for whole, array in ((cache.whole_keys, keys), (cache.whole_values, values)):
        assert (whole.dtype, whole.shape) == (array.dtype, (2, 2, 71, array.shape[-1]))
        assert whole.tobytes() == array[:, [1, 3]].tobytes()
        assert whole.tobytes() != array[:, [3, 1]].tobytes()  # wrong twin: in the order in which they were named


@ALL_CACHES
def test_the_other_heads_are_clustered_as_if_they_were_alone(kind):
    keys, values = tokens()
    cache, _ = filled(kind, WHOLE, keys, values)
    alone, _ = filled(kind, (), keys[:, OTHERS], values[:, OTHERS])
    assert held(cache) == held(alone)
    assert (cache.n_stored, cache.n_seen) == (alone.n_stored, 71)
    every, _ = filled(kind, (), keys, values)
    seen = [array[:, OTHERS].tobytes() for array in (every.keys, every.values, every.counts)]
    assert (seen == held(cache)) == (kind != "distinctive")  # wrong twin: whole heads have a say in what stays exact


@ALL_CACHES
def test_without_whole_heads_nothing_changes(kind):
    cache, returned = filled(kind, (), *tokens())
    assert (cache.whole_heads, cache.whole_keys, cache.whole_values) == ((), None, None)
    for ours, theirs in zip(cache.entries(), (cache.keys, cache.values, cache.counts), strict=True):
        assert ours is theirs
    assert returned[0].shape[-2] < 71
    assert cache.nbytes == cache.keys.nbytes + cache.values.nbytes + cache.counts.nbytes


@ALL_CACHES
def test_attention_is_that_of_each_head(kind):
    keys, values = tokens()
    query = make_keys("normal", (2, 5, 3, 8), DTYPES["f32"], seed=1)
    cache, _ = filled(kind, WHOLE, keys, values)
    for scale in (None, 0.3):
        right = np.empty((2, 5, 3, 6))
        for row, head in np.ndindex(2, 5):
            if head in WHOLE:
                right[row, head] = attention(query[row, head], keys[row, head], values[row, head], scale=scale)
            else:
                entries = (array[row, OTHERS.index(head)] for array in (cache.keys, cache.values, cache.counts))
                right[row, head] = clustered_attention(query[row, head], *entries, scale=scale)
        output = cache.attend(query, scale=scale)
        assert equal_in_float64(output, right)
        assert not equal_in_float64(output[:, [*OTHERS, 1, 3]], right)  # wrong twin: the heads in another order


@ALL_CACHES
def test_entries_are_one_rectangle_whose_short_heads_begin_with_counts_of_zero(kind):
    keys, values = tokens()
    cache, _ = filled(kind, WHOLE, keys, values)
    all_keys, all_values, counts = cache.entries()
    n_padded = 71 - cache.n_stored
    assert (counts.shape, counts.dtype) == ((2, 5, 71), np.int32)
    for head in range(5):
        start = 0 if head in WHOLE else n_padded
        where, array = ((1, 3).index(head), "whole_") if head in WHOLE else (OTHERS.index(head), "")
        for given, stored in ((all_keys, "keys"), (all_values, "values")):
            assert given[:, head, start:].tobytes() == getattr(cache, array + stored)[:, where].tobytes()
            assert not given[:, head, :start].any()
        right = np.ones((2, 71)) if head in WHOLE else np.pad(cache.counts[:, where], ((0, 0), (n_padded, 0)))
        assert np.array_equal(counts[:, head], right)
        assert not np.array_equal(counts[:, head], right[:, ::-1]) or head in WHOLE  # wrong twin: zeros last
    assert (counts.sum(axis=-1) == 71).all()


def test_one_rectangle_by_hand():
    """Heads 0 and 2 have two tokens, head 1 has one entry of two."""
    keys = np.arange(6, dtype=np.float32).reshape(3, 2, 1)
    other, whole = apart(keys, (0, 2))
    assert (other.ravel().tolist(), whole.ravel().tolist()) == ([2, 3], [0, 1, 4, 5])
    stored, two = other[:, :1] + 0.5, np.array([[2]], dtype=np.int32)
    all_keys, all_values, counts = together(stored, -stored, two, whole, -whole, (0, 2))
    assert all_keys[..., 0].tolist() == [[0, 1], [0, 2.5], [4, 5]]
    assert (-all_values[..., 0]).tolist() == [[0, 1], [0, 2.5], [4, 5]]
    assert counts.tolist() == [[1, 1], [0, 2], [1, 1]]


@ALL_CACHES
def test_append_returns_the_rectangle_before_the_clustering(kind):
    keys, values = tokens()
    cache, _ = filled(kind, WHOLE, keys, values, (50, 1))
    before = cache.counts
    returned = cache.append(keys[..., 51:, :], values[..., 51:, :])
    right = np.concatenate([np.zeros((2, 3, 51 - before.shape[-1])), before, np.ones((2, 3, 20))], axis=-1)
    assert np.array_equal(returned[2][:, OTHERS], right)
    assert (returned[2][:, [1, 3]] == 1).all()
    assert returned[0][..., -20:, :].tobytes() == keys[..., 51:, :].tobytes()
    assert returned[1][..., -20:, :].tobytes() == values[..., 51:, :].tobytes()
    assert not np.array_equal(returned[2], cache.entries()[2])  # wrong twin: after it


@ALL_CACHES
def test_bytes_are_those_of_both_kinds_of_heads(kind):
    cache, _ = filled(kind, WHOLE, *tokens("f16"))
    assert cache.nbytes == 2 * 3 * cache.n_stored * (2 * (8 + 6) + 4) + 2 * 2 * 71 * 2 * (8 + 6)


@ALL_CACHES
def test_all_heads_may_stay_whole(kind):
    keys, values = tokens()
    query = make_keys("normal", (2, 5, 3, 8), DTYPES["f32"], seed=1)
    cache, _ = filled(kind, range(5), keys, values)
    some, _ = filled(kind, WHOLE, keys, values)
    assert cache.keys.shape == (2, 0, some.n_stored, 8)
    assert equal_in_float64(cache.attend(query), attention(query, keys, values))
    assert not equal_in_float64(some.attend(query), attention(query, keys, values))


@pytest.mark.parametrize("kind", ["soft matching", "distinctive"])
@pytest.mark.parametrize("pieces", [(71,), (0, 1, 30, 40), (1,) * 71], ids=["once", "pieces", "singly"])
def test_any_split_gives_the_same_bytes(kind, pieces):
    keys, values = tokens()
    cache, right = filled(kind, WHOLE, keys, values, pieces)[0], filled(kind, WHOLE, keys, values)[0]
    assert held(cache) == held(right)
    assert (cache.whole_keys.tobytes(), cache.n_seen) == (right.whole_keys.tobytes(), 71)
    assert held(filled(kind, (2,), keys, values)[0]) != held(right)  # wrong twin: another head


def test_whole_heads_are_not_part_of_a_budget():
    keys, values = tokens()
    budgets = [filled("chelsea", heads, keys, values)[0].budget for heads in ((), WHOLE, range(5))]
    assert budgets == [18] * 3  # 0.3 * (50 + 9)
    assert [filled("chelsea", heads, keys, values)[0].n_stored for heads in ((), WHOLE)] == [18] * 2


@ALL_CACHES
def test_the_last_leading_axis_is_that_of_the_heads(kind):
    """Batch rows 0 and 1 both keep head 1, without a batch axis too."""
    keys, values = tokens()
    cache, _ = filled(kind, (1,), keys, values)
    row, _ = filled(kind, (1,), keys[1], values[1])
    assert row.whole_keys.tobytes() == cache.whole_keys[1].tobytes() == keys[1, 1].tobytes()
    assert row.keys.tobytes() == cache.keys[1].tobytes()
    assert row.keys.shape[0] == 4


@ALL_CACHES
@pytest.mark.parametrize(
    ("heads", "error", "message"),
    [
        ("1", TypeError, "whole_heads must be a sequence of integers, got '1'"),
        (1, TypeError, "whole_heads must be a sequence of integers, got 1"),
        (None, TypeError, "whole_heads must be a sequence of integers, got None"),
        ([True], TypeError, "whole_heads must be an integer, got True"),
        ([0.0], TypeError, "whole_heads must be an integer, got 0.0"),
        ([2, -1], ValueError, "whole_heads must be at least 0, got -1"),
        ([2, 0, 2], ValueError, "whole_heads must be different heads, got [2, 0, 2]"),
    ],
)
def test_wrong_heads_are_refused(kind, heads, error, message):
    with pytest.raises(error) as refusal:
        CACHES[kind](heads)
    assert str(refusal.value) == message


@ALL_CACHES
def test_heads_that_the_keys_do_not_have_are_refused_and_the_cache_stays_empty(kind):
    keys, values = tokens()
    cache = CACHES[kind]([2, np.int64(4)])
    assert cache.entries() == (None, None, None)
    for wrong in (keys[:, :4], keys[:, :0], keys[0, 0]):
        heads = wrong.shape[-3] if wrong.ndim > 2 else 0
        message = f"whole_heads must be below the heads of keys, {heads}, got 4 for keys of shape {wrong.shape}"
        with pytest.raises(ValueError, match=re.escape(message)):
            cache.append(wrong, wrong)
        assert (cache.n_seen, cache.n_stored, cache.nbytes, cache.keys, cache.whole_keys) == (0, 0, 0, None, None)
    cache.append(keys, values)
    assert cache.whole_keys.tobytes() == keys[:, [2, 4]].tobytes()


@ALL_CACHES
def test_a_refused_append_leaves_whole_heads_as_they_were(kind):
    keys, values = tokens()
    cache, right = filled(kind, WHOLE, keys, values)[0], filled(kind, WHOLE, keys, values)[0]
    infinite = np.where(keys > 2, np.float32(np.inf), keys)
    for wrong, message in ((infinite, "keys must be finite"), (keys[:, :4], "keys must fit what the cache holds")):
        with pytest.raises(ValueError, match=message):
            cache.append(wrong, values[:, : wrong.shape[1]])
        assert held(cache) == held(right)
        assert cache.whole_keys.tobytes() == right.whole_keys.tobytes() == keys[:, [1, 3]].tobytes()
        assert cache.whole_values.tobytes() == right.whole_values.tobytes()
        assert cache.n_seen == 71
