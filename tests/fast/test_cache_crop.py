"""Tokens taken out again: the cache is then, bit for bit, that of the tokens that are left."""

import copy
import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from agreement import assert_same_bits
from caches import make_cache
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import DTYPES, make_keys, to_torch

from kvcluster import fast, reference
from kvcluster.fast.entry_cache import UNDO_TOKENS
from kvcluster.fast.memory.overwritten import Overwritten

SMALL = {"keep_ratio": 0.5, "chunk_size": 6, "n_sink": 2, "n_recent": 3}
PLANS = {
    "chunks": SMALL,
    "budget": {**SMALL, "budget": 25},
    "exact": {**SMALL, "keep_ratio": 1},
    "exact-budget": {**SMALL, "keep_ratio": 1, "budget": 47},
    "tokens": {**SMALL, "chunk_size": 1, "n_recent": 0, "budget": 9},
}
EACH_PLAN = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)


def tokens_of(n_tokens, seed=0):
    return make_keys("normal", (2, n_tokens, 4), DTYPES["bf16"], seed)


def of_tokens(array, plan):
    """The reference's cache of these tokens, which are keys and values at once."""
    cache = make_cache(reference, **plan)
    cache.append(array, array)
    return cache


def fed(array, plan, cuts=()):
    cache = make_cache(fast, **plan)
    for start, stop in itertools.pairwise([0, *cuts, array.shape[1]]):
        cache.append(to_torch(array[:, start:stop]), to_torch(array[:, start:stop]))
    return cache


def assert_same_cache(fast_cache, cache):
    for name in ("keys", "values", "counts"):
        assert_same_bits(getattr(fast_cache, name).contiguous(), getattr(cache, name))
    for name in ("n_seen", "n_stored", "n_clustered", "nbytes"):
        assert getattr(fast_cache, name) == getattr(cache, name), name


@pytest.mark.slow
@settings(max_examples=60)
@given(
    plan=st.sampled_from(list(PLANS.values())),
    steps=st.lists(st.tuples(st.booleans(), st.integers(1, 80), st.floats(0, 1)), min_size=1, max_size=8),
)
def test_any_appends_and_crops_leave_the_cache_of_the_tokens_that_are_left(plan, steps):
    cache, tokens, last = make_cache(fast, **plan), tokens_of(0), 0
    for seed, (is_crop, n_new, share) in enumerate(steps):
        if is_crop:
            assert min(last, cache.n_seen) <= cache.n_croppable <= cache.n_seen
            n_tokens = round(share * cache.n_croppable)
            cache.crop(n_tokens)
            tokens, last = tokens[:, : tokens.shape[1] - n_tokens], max(0, last - n_tokens)
        else:
            new, last = tokens_of(n_new, seed), n_new
            cache.append(to_torch(new), to_torch(new))
            tokens = np.concatenate([tokens, new], axis=1)
        assert cache.n_seen == tokens.shape[1]
    if cache.n_seen:
        assert_same_cache(cache, of_tokens(tokens, plan))


@pytest.mark.slow
@EACH_PLAN
def test_every_crop_within_the_last_append_is_possible(plan):
    tokens = tokens_of(150)
    cache = fed(tokens, plan, [80])
    assert cache.n_croppable >= 70
    for n_tokens in range(0, 71, 2):
        cropped = copy.deepcopy(cache)
        cropped.crop(n_tokens)
        assert_same_cache(cropped, of_tokens(tokens[:, : 150 - n_tokens], plan))
        for n_more in range(0, cropped.n_croppable, 23):  # and so is another one after it
            twice = copy.deepcopy(cropped)
            twice.crop(n_more)
            assert_same_cache(twice, of_tokens(tokens[:, : 150 - n_tokens - n_more], plan))


def n_saved(cache):
    """Every chunk that is clustered and every merge of spans makes it larger."""
    return cache.n_seen - cache.n_stored


@pytest.mark.slow
@EACH_PLAN
def test_what_a_long_append_has_clustered_stays(plan):
    """Then as many tokens can be cropped as changed nothing in the reference's body, and no token more."""
    tokens = tokens_of(310)
    for n_tokens in range(301, 311):
        cache, now = fed(tokens[:, :n_tokens], plan), of_tokens(tokens[:, :n_tokens], plan)
        most = cache.n_croppable
        with pytest.raises(ValueError, match=f"^n_tokens must be at most {most}, older tokens are clustered for good"):
            cache.crop(most + 1)
        assert_same_cache(cache, now)
        cache.crop(most)
        if cache.n_seen:
            assert_same_cache(cache, of_tokens(tokens[:, : n_tokens - most], plan))
            assert n_saved(of_tokens(tokens[:, : n_tokens - most - 1], plan)) < n_saved(cache) == n_saved(now)


def test_an_append_is_undone_up_to_so_many_tokens():
    tokens = tokens_of(2 * UNDO_TOKENS + 300)
    for plan in PLANS.values():
        cache = fed(tokens[:, : 300 + UNDO_TOKENS], plan, [300])
        cache.crop(UNDO_TOKENS)
        assert_same_cache(cache, of_tokens(tokens[:, :300], plan))
    assert fed(tokens, SMALL, [300]).n_croppable < 2 * UNDO_TOKENS


def test_what_does_not_cluster_can_be_cropped_across_appends():
    plan = {**SMALL, "chunk_size": 64}
    tokens = tokens_of(100)
    cache = fed(tokens, plan, range(70, 100))
    assert cache.n_croppable == 31  # the token that made the chunk leave, and what came after it
    cache.crop(29)
    assert_same_cache(cache, of_tokens(tokens[:, :71], plan))


def test_an_exact_cache_within_its_budget_can_always_be_cropped():
    tokens = tokens_of(47)
    for n_tokens in range(48):
        cache = fed(tokens, PLANS["exact-budget"], [3, 40, 46])
        cache.crop(n_tokens)
        assert (cache.keys == to_torch(tokens[:, : 47 - n_tokens])).all()
        assert cache.n_clustered == of_tokens(tokens[:, : 47 - n_tokens], PLANS["exact-budget"]).n_clustered


@EACH_PLAN
def test_a_cache_cropped_to_nothing_begins_anew(plan):
    tokens = tokens_of(150)
    cache = fed(tokens[:, :90], plan)
    cache.crop(90)
    assert (cache.n_seen, cache.n_stored, cache.n_clustered, cache.nbytes) == (0, 0, 0, 0)
    with pytest.raises(ValueError, match="n_tokens must be at most 0"):
        cache.crop(1)
    cache.append(to_torch(tokens), to_torch(tokens))
    assert_same_cache(cache, of_tokens(tokens, plan))


@EACH_PLAN
def test_crop_between_extend_and_cluster(plan):
    tokens = tokens_of(120)
    for n_tokens in (0, 5, 40):
        cache = fed(tokens[:, :80], plan)
        cache.extend(to_torch(tokens[:, 80:]), to_torch(tokens[:, 80:]))
        cache.crop(n_tokens)
        assert_same_cache(cache, of_tokens(tokens[:, : 120 - n_tokens], plan))


@pytest.mark.parametrize(
    ("n_tokens", "error", "message"),
    [
        (-1, ValueError, "n_tokens must be at least 0, got -1"),
        (1.0, TypeError, "n_tokens must be an integer, got 1.0"),
        (True, TypeError, "n_tokens must be an integer, got True"),
        (8, ValueError, "n_tokens must be at most 7, older tokens are clustered for good, got 8"),
    ],
)
def test_wrong_numbers_of_tokens_are_refused(n_tokens, error, message):
    cache = fed(tokens_of(7), SMALL)
    with pytest.raises(error, match=f"^{message}$"):
        cache.crop(n_tokens)
    assert_same_cache(cache, of_tokens(tokens_of(7), SMALL))
    empty = make_cache(fast, **SMALL)
    empty.crop(0)
    assert (empty.n_croppable, empty.keys) == (0, None)


def batch_of_two(plan):
    tokens = tokens_of(90)
    return tokens, fed(tokens, plan, [50])


@EACH_PLAN
def test_beams_are_cropped_as_they_were_selected(plan):
    tokens, cache = batch_of_two(plan)
    cache.select(torch.tensor([1, 1, 0]))
    cache.crop(33)
    assert_same_cache(cache, of_tokens(tokens[[1, 1, 0], :57], plan))


@pytest.mark.parametrize("plan", ["chunks", "budget"])
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("put_back", lambda kept, held, n_stored: None),
        ("select", lambda kept, indices: replace(kept, entries=tuple(x[[0, 1]] for x in kept.entries))),
    ],
    ids=["nothing put back", "kept rows as they were"],
)
def test_wrong_twins_of_undoing_are_told_apart(plan, name, change, monkeypatch):
    monkeypatch.setattr(Overwritten, name, change)
    tokens, cache = batch_of_two(PLANS[plan])
    cache.select(torch.tensor([1, 0]))
    cache.crop(33)
    with pytest.raises(AssertionError):
        assert_same_cache(cache, of_tokens(tokens[[1, 0], :57], PLANS[plan]))


@EACH_PLAN
def test_a_copy_is_cropped_alone(plan):
    tokens, cache = batch_of_two(plan)
    copied = copy.deepcopy(cache)
    copied.crop(33)
    assert_same_cache(copied, of_tokens(tokens[:, :57], plan))
    assert_same_cache(cache, of_tokens(tokens, plan))
    cache.crop(40)
    assert_same_cache(cache, of_tokens(tokens[:, :50], plan))


@EACH_PLAN
@pytest.mark.parametrize("is_selected", [False, True])
def test_what_was_filled_in_inference_mode_is_cropped_outside(plan, is_selected):
    with torch.inference_mode():
        tokens, cache = batch_of_two(plan)
        if is_selected:
            cache.select(torch.tensor([0, 1]))
    cache.crop(33)
    assert_same_cache(cache, of_tokens(tokens[:, :57], plan))
    cache.append(to_torch(tokens[:, 57:]), to_torch(tokens[:, 57:]))
    assert_same_cache(cache, of_tokens(tokens, plan))


def test_what_is_kept_is_counted_and_let_go():
    tokens = tokens_of(80)
    cache, of_entry = fed(tokens, SMALL, [60]), 2 * (4 * 2 + 4 * 2 + 4)
    held = sum(tensor.untyped_storage().nbytes() for tensor in cache._held)
    n_chunks = (80 - 5) // 6 - (60 - 5) // 6
    assert cache.nbytes_reserved == held + n_chunks * 6 * of_entry
    cache.append(to_torch(tokens[:, :1]), to_torch(tokens[:, :1]))
    assert cache.nbytes_reserved == sum(tensor.untyped_storage().nbytes() for tensor in cache._held)
    assert cache.nbytes == cache.n_stored * of_entry


def test_a_restored_cache_has_nothing_to_undo():
    tokens = tokens_of(80)
    cache, restored = fed(tokens, SMALL, [60]), make_cache(fast, **SMALL)
    restored.restore(*cache.state())
    assert restored.n_croppable == (80 - 5) % 6 < 20 <= cache.n_croppable
    restored.crop(3)
    assert_same_cache(restored, of_tokens(tokens[:, :77], SMALL))
