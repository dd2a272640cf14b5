"""`ChelseaCache`: its budget, when it compresses and what, how tokens arrive, and what it refuses."""

import itertools
import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from inputs import DTYPES, make_keys

from kvcluster.reference import ChelseaCache
from kvcluster.reference.pooled_matching import compress_entries

PLAN = {"ratio": 0.3, "max_new_tokens": 20, "interval": 5, "chunk_size": 8, "n_sink": 3, "n_recent": 6}
KEYS, VALUES = (make_keys("normal", (2, 2, 100, dim), DTYPES["f32"], seed=dim) for dim in (8, 6))


def filled(pieces, keys=KEYS, values=VALUES, **rules):
    cache = ChelseaCache(**rules)
    for start, stop in itertools.pairwise(itertools.accumulate((0, *pieces))):
        cache.append(keys[..., start:stop, :], values[..., start:stop, :])
    return cache


def held(cache):
    return [array.tobytes() for array in (cache.keys, cache.values, cache.counts)]


@pytest.mark.parametrize(
    ("ratio", "n_prompt", "max_new_tokens", "budget"),
    [
        (0.5, 12, 4, 8),
        (0.5, 12, 5, 9),  # rounded up
        (0.07, 90, 10, 8),  # 7.000000000000001 in float64
        (0.28, 25, 0, 8),  # the same
        (np.float32(0.07), 100, 0, 8),
        (1, 30, 20, 50),
        (0.01, 30, 20, 4),  # one sink, two recent tokens, one centroid
        (5e-324, 30, 20, 4),
    ],
)
def test_the_budget_is_the_ceiling_of_a_float64_product(ratio, n_prompt, max_new_tokens, budget):
    rules = {"ratio": ratio, "max_new_tokens": max_new_tokens, "n_sink": 1, "n_recent": 2}
    assert filled((n_prompt,), **rules).budget == budget
    assert filled((7,), **rules, n_prompt=n_prompt).budget == budget


def test_the_budget_wrong_twins_are_told_apart():
    """Floor, an exact product, the prompt alone."""
    budget = filled((90,), ratio=0.07, max_new_tokens=10, n_sink=1, n_recent=2).budget
    assert budget not in (math.floor(0.07 * 100), math.ceil(Fraction(7, 100) * 100), math.ceil(0.07 * 90))


def test_sinks_recent_tokens_and_one_centroid_are_the_least():
    cache = filled((90, 10), **PLAN | {"ratio": 0.001})
    assert cache.budget == cache.n_stored == 3 + 6 + 1
    assert cache.counts[0, 1].tolist() == [1, 1, 1, 91, 1, 1, 1, 1, 1, 1]


def test_the_prompt_is_the_first_append_that_has_tokens():
    cache = ChelseaCache(**PLAN)
    budgets = []
    for start, stop in ((0, 0), (0, 40), (40, 40), (40, 90)):
        cache.append(KEYS[..., start:stop, :], VALUES[..., start:stop, :])
        budgets.append(cache.budget)
    assert budgets == [None, 18, 18, 18]
    assert filled((1, 89), **PLAN).budget == 3 + 6 + 1  # 21 tokens have 7 entries, too few
    assert filled((1, 89), **PLAN, n_prompt=40).budget == 18
    assert filled((1,), **PLAN, n_prompt=0).budget == 3 + 6 + 1


def sizes_token_by_token(n_prompt, n_new, budget, interval):
    """How many entries there must be after the prompt and after each token."""
    sizes = [n_prompt if n_prompt <= budget + interval else budget]
    for _ in range(n_new):
        sizes.append(budget if sizes[-1] + 1 > budget + interval else sizes[-1] + 1)
    return sizes


@pytest.mark.parametrize("interval", [0, 1, 5])
@pytest.mark.parametrize("n_prompt", [10, 23, 60])
def test_it_compresses_when_budget_and_interval_are_outgrown(n_prompt, interval):
    cache, sizes = ChelseaCache(**PLAN | {"interval": interval, "n_prompt": 60}), []
    for start, stop in itertools.pairwise((0, *range(n_prompt, 101))):
        cache.append(KEYS[..., start:stop, :], VALUES[..., start:stop, :])
        sizes.append(cache.n_stored)
        assert cache.n_seen == stop
        assert (cache.counts.sum(axis=-1) == stop).all()
    assert sizes == sizes_token_by_token(n_prompt, 100 - n_prompt, 24, interval)
    for wrong in ((25, interval), (23, interval), (24, interval + 1)):
        assert sizes != sizes_token_by_token(n_prompt, 100 - n_prompt, *wrong)


def test_a_prompt_within_budget_and_interval_stays_exact():
    """0.3 * (32 + 20) is 15.6: 21 entries are let be, and 16 are left of more."""
    cache = filled((21,), **PLAN, n_prompt=32)
    assert (cache.keys.tobytes(), cache.counts.max()) == (KEYS[..., :21, :].tobytes(), 1)
    assert filled((22,), **PLAN, n_prompt=32).n_stored == 16


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_between_sinks_and_recent_tokens_is_compressed(dtype):
    """Twice: first tokens alone, then centroids with their counts and new tokens alike."""
    keys, values = (make_keys("smooth", (2, 100, dim), DTYPES[dtype], seed=dim) for dim in (8, 5))
    cache, held_before = ChelseaCache(**PLAN), (keys[:, :0], values[:, :0], np.ones((2, 0), dtype=np.int32))
    for start, stop in ((0, 80), (80, 100)):
        new = keys[:, start:stop], values[:, start:stop], np.ones((2, stop - start), dtype=np.int32)
        before = [np.concatenate(pair, axis=1) for pair in zip(held_before, new, strict=True)]
        seen = cache.append(*new[:2])
        assert [array.tobytes() for array in seen] == [array.tobytes() for array in before]
        body = compress_entries(*(array[:, 3:-6] for array in before), target=30 - 3 - 6, chunk_size=8)
        for array, old, middle in zip((cache.keys, cache.values, cache.counts), before, body, strict=True):
            right = np.concatenate([old[:, :3], middle.astype(old.dtype), old[:, -6:]], axis=1)
            assert (array.dtype, array.tobytes()) == (right.dtype, right.tobytes())
        held_before = cache.keys, cache.values, cache.counts
    twin = compress_entries(*(array[:, :-6] for array in before), target=30 - 6, chunk_size=8)  # sinks too
    assert cache.counts[:, :-6].tolist() != twin[2].tolist()


def test_steps_are_rounded_to_float32_and_the_result_to_the_dtype():
    """The wrong twin rounds to bfloat16 in every step: 71 entries become 36, then 21."""
    keys = make_keys("smooth", (80, 8), DTYPES["bf16"], seed=3)
    cache = filled((80,), keys, keys, **PLAN)
    entries = keys[3:-6], keys[3:-6], np.ones(71, dtype=np.int32)
    right = compress_entries(*entries, target=21, chunk_size=8)[0].astype(ml_dtypes.bfloat16)
    assert cache.keys[3:-6].tobytes() == right.tobytes()
    *halves, counts = compress_entries(*entries, target=36, chunk_size=8)
    halves = [half.astype(ml_dtypes.bfloat16) for half in halves]
    twin = compress_entries(*halves, counts, target=21, chunk_size=8)[0].astype(ml_dtypes.bfloat16)
    assert twin.tobytes() != right.tobytes()


def test_a_centroid_weighs_by_its_tokens_when_it_is_clustered_again():
    """Four tokens of mean 6 and one of 16 have the mean 8; if each entry weighed the same, 11."""
    rules = {"ratio": 0.1, "max_new_tokens": 0, "interval": 0, "chunk_size": 2, "n_sink": 0, "n_recent": 0}
    values = np.array([0, 4, 8, 12, 16], dtype=np.float32)[:, None]
    cache = filled((4, 1), np.ones_like(values), values, **rules)
    assert (cache.budget, cache.values.tolist(), cache.counts.tolist()) == (1, [[8]], [5])
    assert filled((4,), np.ones_like(values), values, **rules).values.tolist() == [[6]]


def test_it_depends_on_how_the_tokens_arrive():
    whole, split = filled((100,), **PLAN, n_prompt=100), filled((60, 40), **PLAN, n_prompt=100)
    assert (whole.budget, whole.n_stored) == (split.budget, split.n_stored) == (36, 36)
    assert held(whole) != held(split)
    assert filled((60, 40), **PLAN).budget == 24  # the first piece is taken for the prompt


def test_it_does_not_depend_on_splits_between_which_nothing_is_compressed():
    rules = {**PLAN, "n_prompt": 100}  # 36 entries, 5 more are let grow
    whole, later = filled((100,), **rules), filled((41, 59), **rules)
    for pieces in ((1, 99), (0, 40, 1, 59), (*[1] * 41, 59)):
        assert held(filled(pieces, **rules)) == held(whole)
    assert held(later) == held(whole)
    assert held(filled((42, 58), **rules)) != held(whole)  # wrong twin: one token more


def test_append_returns_what_new_tokens_attend_to():
    cache = filled((60,), **PLAN)
    keys, values, counts = cache.append(KEYS[..., 60:90, :], VALUES[..., 60:90, :])
    assert (counts.shape[-1], cache.n_stored) == (24 + 30, 24)
    assert keys[..., -30:, :].tobytes() == KEYS[..., 60:90, :].tobytes()
    assert values[..., -30:, :].tobytes() == VALUES[..., 60:90, :].tobytes()
    assert (counts.sum(axis=-1) == 90).all()
    assert (counts[..., -30:] == 1).all()


def test_leading_indices_are_problems_of_their_own():
    together = filled((60, 40), **PLAN)
    for head in np.ndindex(2, 2):
        alone = filled((60, 40), KEYS[head], VALUES[head], **PLAN)
        for name in ("keys", "values", "counts"):
            assert getattr(together, name)[head].tobytes() == getattr(alone, name).tobytes()
    other = filled((60, 40), KEYS[0, 1], VALUES[0, 0], **PLAN)
    assert together.keys[0, 0].tobytes() != other.keys.tobytes()  # wrong twin: the other head's keys


def test_the_cache_copies_what_it_is_given():
    keys, values = KEYS.copy(), VALUES.copy()
    cache = ChelseaCache(**PLAN)
    cache.append(keys[..., :60, :], values[..., :60, :])
    cache.append(keys[..., 60:61, :], values[..., 60:61, :])
    before = held(cache)
    keys[:], values[:] = 0, 0
    assert held(cache) == before


def test_an_empty_cache_answers():
    cache = ChelseaCache(**PLAN)
    assert (cache.n_seen, cache.n_stored, cache.nbytes, cache.budget) == (0, 0, 0, None)
    with pytest.raises(ValueError, match="attend needs at least one appended token, got an empty cache"):
        cache.attend(KEYS[..., :2, :])


@pytest.mark.parametrize(
    ("parameters", "error", "message"),
    [
        ({"ratio": 0}, ValueError, "ratio must be in (0, 1], got 0"),
        ({"ratio": 1.5}, ValueError, "ratio must be in (0, 1], got 1.5"),
        ({"ratio": float("nan")}, ValueError, "ratio must be in (0, 1], got nan"),
        ({"ratio": "half"}, TypeError, "ratio must be a number, got 'half'"),
        ({"ratio": True}, TypeError, "ratio must be a number, got True"),
        ({"max_new_tokens": -1}, ValueError, "max_new_tokens must be at least 0, got -1"),
        ({"max_new_tokens": 1.0}, TypeError, "max_new_tokens must be an integer, got 1.0"),
        ({"n_prompt": -1}, ValueError, "n_prompt must be at least 0, got -1"),
        ({"n_prompt": True}, TypeError, "n_prompt must be an integer, got True"),
        ({"interval": -1}, ValueError, "interval must be at least 0, got -1"),
        ({"interval": None}, TypeError, "interval must be an integer, got None"),
        ({"chunk_size": 1}, ValueError, "chunk_size must be at least 2, got 1"),
        ({"n_sink": -1}, ValueError, "n_sink must be at least 0, got -1"),
        ({"n_recent": -2}, ValueError, "n_recent must be at least 0, got -2"),
        ({"whole_heads": [0, 0]}, ValueError, "whole_heads must be different heads, got [0, 0]"),
    ],
)
def test_wrong_parameters_are_refused(parameters, error, message):
    with pytest.raises(error) as refusal:
        ChelseaCache(**PLAN | parameters)
    assert str(refusal.value) == message


def test_the_least_parameters_are_taken():
    least = {"max_new_tokens": 0, "n_prompt": 0, "interval": 0, "chunk_size": 2, "n_sink": 0, "n_recent": 0}
    assert filled((5, 1), ratio=np.float32(0.01), **least).counts.tolist() == [[[6], [6]], [[6], [6]]]


@pytest.mark.parametrize("n_before", [0, 60])
def test_a_refused_append_leaves_the_cache_as_it_was(n_before):
    nan = np.where(KEYS > 2, np.float32(np.nan), KEYS)
    refused = [(nan, VALUES, "keys must be finite"), (KEYS, VALUES[..., 1:, :], "values must have the leading axes")]
    if n_before:
        refused += [
            (KEYS[..., :5], VALUES, "keys must fit what the cache holds"),
            (KEYS[:1], VALUES[:1], "keys must fit what the cache holds"),
            (KEYS, VALUES.astype(np.float16), "values must have the dtype of the cache, float32, got float16"),
        ]
    cache, right = (filled((n_before,) if n_before else (), **PLAN) for _ in range(2))
    for keys, values, message in refused:
        with pytest.raises(ValueError, match=message):
            cache.append(keys, values)
        assert (cache.n_seen, cache.n_stored, cache.budget) == (right.n_seen, right.n_stored, right.budget)
        assert cache.keys is None or held(cache) == held(right)
    for each in (cache, right):
        each.append(KEYS[..., n_before:, :], VALUES[..., n_before:, :])
    assert held(cache) == held(right)
    assert held(cache) != held(filled((n_before + 1, 99 - n_before), **PLAN))  # wrong twin: a token less
