"""Tokens taken out of a recall cache: it is that of the others, as if these had never come."""

import copy

import numpy as np
import pytest
import torch
from agreement import assert_same_bits
from caches import make_tiered
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import DTYPES, KINDS, make_keys, to_torch

from kvcluster import fast, reference
from kvcluster.fast.memory import body_clusters, fast_tier

SMALL = {"budget": 24, "n_sink": 3, "n_recent": 2, "tokens_per_cluster": 3, "segment_size": 8, "max_iter": 2}
SMALL["prompt_segment_size"] = 20
CLASSES = [fast.RecallCache, make_tiered]


def tokens_of(seed, n_tokens, *, kind="normal", dtype="f32", lead=(2, 2)):
    return [make_keys(of, (*lead, n_tokens, 16), DTYPES[dtype], seed + i) for i, of in enumerate((kind, "normal"))]


def query_of(seed, dtype="f32"):
    return make_keys("normal", (2, 2, 3, 16), DTYPES[dtype], seed)


def filled(cache, pieces, convert=to_torch):
    for keys, values in pieces:
        cache.append(convert(keys), convert(values))
    return cache


def cropped(pieces, n_tokens):
    """`pieces` without their last tokens; none of those left is empty."""
    pieces = list(pieces)
    while n_tokens > 0:
        keys, values = pieces.pop()
        kept = max(0, keys.shape[-2] - n_tokens)
        n_tokens -= keys.shape[-2] - kept
        if kept:
            pieces.append((keys[..., :kept, :], values[..., :kept, :]))
    return pieces


def assert_cache_of(cache, pieces, parameters, query):
    """`cache` is that of the reference and that of `fast`, filled with `pieces` only, and answers as they do."""
    expected = filled(reference.RecallCache(**parameters), pieces, np.copy)
    assert (cache.n_seen, cache.n_clustered) == (expected.n_seen, expected.n_clustered)
    if not pieces:
        assert (cache.keys, cache.values, cache.clusters, cache.nbytes) == (None, None, None, 0)
        return
    assert_same_bits(cache.keys, expected.keys)
    assert_same_bits(cache.values, expected.values)
    assert (cache.clusters is None) == (expected.clusters is None)
    if expected.clusters is not None:
        assert_same_bits(cache.deviations, expected.deviations)
        for name in ("labels", "counts", "centroids"):
            assert_same_bits(getattr(cache.clusters, name), getattr(expected.clusters, name))
        taken = cache.select_clusters(to_torch(query)).taken
        assert_same_bits(taken, expected.select_clusters(query).taken)
    twin = filled(fast.RecallCache(**parameters, backend=cache.body.backend), pieces)
    assert cache.nbytes == twin.nbytes
    assert all(map(torch.equal, cache.stored, twin.stored))
    assert torch.equal(cache.attend(to_torch(query)), twin.attend(to_torch(query)))


@pytest.mark.slow
@settings(max_examples=60)
@given(
    steps=st.lists(
        st.tuples(st.integers(1, 60) | st.integers(1, 4), st.lists(st.integers(0, 40), max_size=2), st.booleans()),
        min_size=1,
        max_size=6,
    ),
    prompt_segment_size=st.sampled_from([None, 0, 7, 20]),
    n_recent=st.integers(0, 3),
    option=st.sampled_from([{}, {"centroids_for_rest": True}, {"is_centred": True}, {"init_seed": 4}]),
    kind=st.sampled_from([kind for kind in KINDS if kind != "huge"]),
    dtype=st.sampled_from(list(DTYPES)),
    backend=st.sampled_from(["torch", "cpp"]),
    cache_class=st.sampled_from(CLASSES),
)
def test_a_cropped_cache_is_that_of_the_tokens_left(
    steps, prompt_segment_size, n_recent, option, kind, dtype, backend, cache_class
):
    """Other tokens come after each crop; what cannot be taken out is refused and nothing is lost."""
    parameters = {**SMALL, **option, "prompt_segment_size": prompt_segment_size, "n_recent": n_recent}
    cache, pieces = cache_class(**parameters, backend=backend), []
    for seed, (n_tokens, crops, is_attended_to) in enumerate(steps):
        pieces.append(tokens_of(2 * seed, n_tokens, kind=kind, dtype=dtype))
        filled(cache, pieces[-1:])
        assert cache.n_croppable >= n_tokens
        if is_attended_to:  # this fills the fast tier
            cache.attend(to_torch(query_of(seed, dtype)))
        for n_cropped in crops:
            if n_cropped <= cache.n_croppable:
                cache.crop(n_cropped)
                pieces = cropped(pieces, n_cropped)
            else:
                with pytest.raises(ValueError, match="n_tokens must be at most"):
                    cache.crop(n_cropped)
            assert_cache_of(cache, pieces, parameters, query_of(seed, dtype))
    assert_cache_of(cache, pieces, parameters, query_of(99, dtype))


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [[50], [4, 30], [50, 1, 1], [50, 9, 4], [50, 1, 25], [50] + [1] * 19])
@pytest.mark.parametrize("prompt_segment_size", [0, 20])
def test_n_croppable_is_all_that_needs_no_older_clusters(sizes, prompt_segment_size):
    """Fewer tokens are left only if clusters would have to go that were there before the last append."""
    parameters = {**SMALL, "prompt_segment_size": prompt_segment_size}
    pieces = [tokens_of(2 * seed, n_tokens) for seed, n_tokens in enumerate(sizes)]
    cache = filled(fast.RecallCache(**parameters), pieces)
    older = filled(reference.RecallCache(**parameters), pieces[:-1], np.copy).n_clustered
    of_fewer = [
        filled(reference.RecallCache(**parameters), cropped(pieces, n_tokens), np.copy).n_clustered
        for n_tokens in range(cache.n_seen + 1)
    ]
    assert cache.n_croppable == max(n_tokens for n_tokens, n_clustered in enumerate(of_fewer) if n_clustered >= older)
    for n_tokens in range(cache.n_croppable + 1):
        less = copy.deepcopy(cache)
        less.crop(n_tokens)
        assert_cache_of(less, cropped(pieces, n_tokens), parameters, query_of(n_tokens))


def dropped_in_cluster_order(right, body, n_tokens, n_clusters):
    return torch.arange(body.n_tokens - n_tokens).expand_as(right(body, n_tokens, n_clusters))


@pytest.mark.parametrize(
    ("place", "wrong", "n_after"),
    [
        ((body_clusters.BodyClusters, "drop"), dropped_in_cluster_order, 0),
        ((fast.RecallCache, "_cluster"), lambda right, cache: None, 0),
        ((fast.RecallCache, "_drop_clusters_of_last_append"), lambda right, cache: None, 0),
        ((fast_tier.FastTier, "keep"), lambda right, tier, n_clusters, _: right(tier, n_clusters, tier.n_exact), 13),
    ],
    ids=["order of arrival", "never clustered anew", "clusters of tokens that left", "stale fast tier"],
)
def test_cropping_wrong_twin_is_told_apart(place, wrong, n_after, monkeypatch):
    pieces, after = [tokens_of(0, 50), tokens_of(2, 30)], [tokens_of(4, n_after)] if n_after else []
    right, cache = getattr(*place), filled(make_tiered(**SMALL), pieces)
    cache.attend(to_torch(query_of(0)))
    right_cache = copy.deepcopy(cache)
    right_cache.crop(13)
    pieces = cropped(pieces, 13) + after
    assert_cache_of(filled(right_cache, after), pieces, SMALL, query_of(0))
    with monkeypatch.context() as patch:
        patch.setattr(*place, lambda *arguments: wrong(right, *arguments))
        cache.crop(13)
    filled(cache, after)
    with pytest.raises(AssertionError):
        assert_cache_of(cache, pieces, SMALL, query_of(0))


@pytest.mark.parametrize("cache_class", CLASSES)
def test_an_empty_cache_takes_tokens_of_another_shape(cache_class):
    cache = filled(cache_class(**SMALL), [tokens_of(0, 60)])
    cache.attend(to_torch(query_of(0)))
    cache.crop(60)
    assert_cache_of(cache, [], SMALL, None)
    cache.crop(0)
    with pytest.raises(ValueError, match="attend needs at least one appended token"):
        cache.attend(to_torch(query_of(0)))
    pieces = [tokens_of(1, 70, lead=(3, 2), dtype="f16"), tokens_of(2, 5, lead=(3, 2), dtype="f16")]
    filled(cache, pieces)
    assert_cache_of(cache, pieces, SMALL, make_keys("normal", (3, 2, 3, 16), DTYPES["f16"], seed=3))


def selected(cache):
    cache.select(torch.tensor([1, 1]))
    return cache


def restored(cache):
    make = fast.RecallCache if type(cache) is fast.RecallCache else make_tiered
    other = make(**SMALL)
    other.restore(*copy.deepcopy(cache.state()))
    return other


@pytest.mark.parametrize("cache_class", CLASSES)
@pytest.mark.parametrize("change", [selected, copy.deepcopy, restored])
@pytest.mark.parametrize("sizes", [[60], [50, 30]], ids=["prompt", "later"])
def test_what_the_last_append_clustered_is_known_to_copies_too(cache_class, change, sizes):
    pieces = [tokens_of(2 * seed, n_tokens) for seed, n_tokens in enumerate(sizes)]
    cache = filled(cache_class(**SMALL), pieces)
    cache.attend(to_torch(query_of(0)))
    n_croppable, cache = cache.n_croppable, change(cache)
    assert cache.n_croppable == n_croppable >= sizes[-1]
    cache.crop(25)
    rows = [1, 1] if change is selected else [0, 1]
    pieces = [[array[rows] for array in piece] for piece in cropped(pieces, 25)]
    assert_cache_of(cache, pieces, SMALL, query_of(1)[rows])


def test_of_older_numbers_nothing_is_known_of_the_last_append():
    cache, older = filled(fast.RecallCache(**SMALL), [tokens_of(0, 60)]), fast.RecallCache(**SMALL)
    tensors, numbers = cache.state()
    older.restore(tensors, {name: numbers[name] for name in ("n_seen", "n_clustered", "is_prompt")})
    assert (cache.n_croppable, older.n_croppable) == (60, 0)


@pytest.mark.parametrize("cache_class", CLASSES)
@pytest.mark.parametrize("sizes", [[60], [50, 30]], ids=["prompt", "later"])
def test_tokens_can_be_taken_out_between_the_halves_of_append(cache_class, sizes):
    *before, last = pieces = [tokens_of(2 * seed, n_tokens) for seed, n_tokens in enumerate(sizes)]
    cache = filled(cache_class(**SMALL), before)
    cache.extend(*map(to_torch, last))
    n_clustered = cache.n_clustered
    cache.crop(7)
    assert cache.n_clustered == n_clustered  # a layer that never clusters does not begin to
    cache.cluster()
    assert_cache_of(cache, cropped(pieces, 7), SMALL, query_of(0))


@pytest.mark.parametrize("cache_class", CLASSES)
@pytest.mark.parametrize("is_filled_in", [True, False])
def test_inference_mode_may_begin_and_end_between_append_and_crop(cache_class, is_filled_in):
    pieces = [tokens_of(0, 50), tokens_of(2, 30), tokens_of(4, 30)]
    cache = cache_class(**SMALL)
    with torch.inference_mode(is_filled_in):
        filled(cache, pieces[:2])
        cache.attend(to_torch(query_of(0)))
    with torch.inference_mode(not is_filled_in):
        cache.crop(25)
        cache.attend(to_torch(query_of(0)))
    filled(cache, pieces[2:])
    cache.crop(9)
    assert_cache_of(cache, cropped([*cropped(pieces[:2], 25), pieces[2]], 9), SMALL, query_of(0))


@pytest.mark.parametrize("cache_class", CLASSES)
def test_bad_numbers_are_refused_and_leave_the_cache_as_it_was(cache_class):
    pieces = [tokens_of(0, 50), tokens_of(2, 9), tokens_of(4, 4)]
    cache = filled(cache_class(**SMALL), pieces)
    cache.attend(to_torch(query_of(0)))
    for n_tokens, error, message in (
        (-1, ValueError, "n_tokens must be at least 0, got -1"),
        (1.0, TypeError, "n_tokens must be an integer, got 1.0"),
        (True, TypeError, "n_tokens must be an integer, got True"),
        (6, ValueError, "n_tokens must be at most 5, clusters .* stay whole, got 6"),
        (64, ValueError, "n_tokens must be at most 5, .* got 64"),
    ):
        with pytest.raises(error, match=message):
            cache.crop(n_tokens)
    assert_cache_of(cache, pieces, SMALL, query_of(0))
    with pytest.raises(ValueError, match="n_tokens must be at most 0, "):
        cache_class(**SMALL).crop(1)


@pytest.mark.parametrize("n_tokens", [0, np.int64(0), np.int64(3)])
def test_numpy_numbers_are_numbers_and_0_does_nothing(n_tokens):
    pieces = [tokens_of(0, 50)]
    cache = filled(make_tiered(**SMALL), pieces)
    cache.attend(to_torch(query_of(0)))
    statistics = copy.copy(cache.statistics)
    cache.crop(n_tokens)
    assert cache.statistics == statistics
    cache.attend(to_torch(query_of(0)))
    if n_tokens == 0:
        assert cache.statistics.nbytes_moved == statistics.nbytes_moved
    assert type(cache.n_seen) is int
    assert_cache_of(cache, cropped(pieces, n_tokens), SMALL, query_of(1))
