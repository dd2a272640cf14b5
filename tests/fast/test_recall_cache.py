"""The recall cache: every token once, the same bytes however they arrive, and the same in NumPy, torch and C++."""

import itertools

import numpy as np
import pytest
import torch
from agreement import assert_same_bits, attention_agrees, equal_in_float64
from hypothesis import given
from hypothesis import strategies as st
from inputs import DTYPES, KINDS, make_keys, to_numpy, to_torch

from kvcluster import fast, reference
from kvcluster.reference.segments import SegmentPlan

SMALL = {"budget": 40, "n_sink": 3, "tokens_per_cluster": 4, "segment_size": 10, "prompt_segment_size": 20}
BACKENDS = ["torch", "cpp"]


def tokens_of(seed, n_tokens, *, dtype="f32", kind="normal", dim=16):
    keys, values = (make_keys(of, (2, n_tokens, dim), DTYPES[dtype], seed + i) for i, of in enumerate((kind, "normal")))
    return keys, values


def filled(cache, keys, values, cuts=(), convert=np.copy):
    """`cache` after it was given the tokens in pieces, cut at `cuts`."""
    for start, stop in itertools.pairwise([0, *sorted(cuts), keys.shape[-2]]):
        cache.append(convert(keys[..., start:stop, :]), convert(values[..., start:stop, :]))
    return cache


def assert_same_cache(ours, expected):
    for name in ("n_seen", "n_stored", "n_clustered"):
        assert getattr(ours, name) == getattr(expected, name), name
    for name in ("keys", "values"):
        assert_same_bits(getattr(ours, name), getattr(expected, name))
    if expected.clusters is not None:
        assert_same_bits(ours.deviations, expected.deviations)
        for name in ("labels", "counts", "centroids"):
            assert_same_bits(getattr(ours.clusters, name), getattr(expected.clusters, name))


@given(
    n_tokens=st.integers(1, 120),
    cuts=st.lists(st.integers(0, 120), max_size=6),
    segment_size=st.integers(1, 20),
    prompt_segment_size=st.sampled_from([None, 0, 7, 200]),
    n_recent=st.integers(0, 5),
    room=st.integers(0, 60),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(list(DTYPES)),
    backend=st.sampled_from(BACKENDS),
)
def test_numpy_torch_and_cpp_recall_the_same(
    n_tokens, cuts, segment_size, prompt_segment_size, n_recent, room, kind, dtype, backend
):
    """After every append: the same clusters, the same tokens taken, the same entries, `budget` of them."""
    parameters = {
        "budget": 3 + n_recent + segment_size + room,
        "n_sink": 3,
        "n_recent": n_recent,
        "tokens_per_cluster": 3,
        "segment_size": segment_size,
        "prompt_segment_size": prompt_segment_size,
    }
    keys, values = tokens_of(n_tokens, n_tokens, dtype=dtype, kind=kind)
    query = make_keys(kind, (2, 3, 16), DTYPES[dtype], seed=5)
    expected, ours = reference.RecallCache(**parameters), fast.RecallCache(**parameters, backend=backend)
    cuts = sorted(min(cut, n_tokens) for cut in cuts)
    for start, stop in itertools.pairwise([0, *cuts, n_tokens]):
        expected.append(keys[:, start:stop], values[:, start:stop])
        ours.append(to_torch(keys[:, start:stop]), to_torch(values[:, start:stop]))
    assert_same_cache(ours, expected)
    chosen, chosen_here = expected.select_clusters(query), ours.select_clusters(to_torch(query))
    assert (chosen is None) == (chosen_here is None)
    if chosen is not None:
        assert_same_bits(chosen_here.taken, chosen.taken)
    entries = expected.entries(chosen)
    assert entries[0].shape[-2] == min(parameters["budget"], n_tokens)
    for mine, theirs in zip(ours.entries(chosen_here)[:2], entries[:2], strict=True):
        assert_same_bits(mine.contiguous(), theirs)
    if kind != "huge":
        assert attention_agrees(ours.attend(to_torch(query)), to_torch(query), *map(to_torch, entries))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_attend_is_attention_to_the_entries_and_to_no_others(dtype, backend):
    keys, values = tokens_of(1, 300, dtype=dtype)
    query = to_torch(make_keys("normal", (2, 4, 16), DTYPES[dtype], seed=2))
    cache = filled(fast.RecallCache(**SMALL, backend=backend), keys, values, convert=to_torch)
    entries = cache.entries(cache.select_clusters(query))
    assert attention_agrees(cache.attend(query), query, *entries)
    less = [array[:, :-1] for array in entries]
    assert not attention_agrees(fast.clustered_attention(query, *less), query, *entries)
    assert not attention_agrees(fast.attention(query, *cache.stored), query, *entries)


@given(n_tokens=st.integers(1, 150), cuts=st.lists(st.integers(0, 150), max_size=5), segment_size=st.integers(1, 15))
def test_every_token_is_there_once(n_tokens, cuts, segment_size):
    """No token is attended to twice or missed at a boundary: with room for all, values name the tokens."""
    keys, _ = tokens_of(3, n_tokens)
    names = np.broadcast_to(np.arange(n_tokens, dtype=np.float32)[:, None], (2, n_tokens, 16))
    parameters = {**SMALL, "budget": 200, "segment_size": segment_size}
    cache = filled(reference.RecallCache(**parameters), keys, names, [min(cut, n_tokens) for cut in cuts])
    _, seen, counts = cache.entries(cache.select_clusters(keys[:, :1]))
    assert (counts == 1).all()
    for head in range(2):
        assert sorted(seen[head, :, 0]) == list(range(n_tokens))
    recent = n_tokens - cache.n_clustered - min(n_tokens, 3)
    assert recent <= cache.plan.n_recent + segment_size


@pytest.mark.slow
@given(n_tokens=st.integers(1, 150), cuts=st.lists(st.integers(0, 150), max_size=6))
def test_without_prompt_segments_any_split_gives_the_same_bytes(n_tokens, cuts):
    keys, values = tokens_of(4, n_tokens)
    parameters = {**SMALL, "prompt_segment_size": 0}
    whole = filled(reference.RecallCache(**parameters), keys, values)
    for split in ([min(cut, n_tokens) for cut in cuts], range(1, n_tokens)):
        ours = filled(fast.RecallCache(**parameters), keys, values, split, convert=to_torch)
        assert_same_cache(ours, whole)


def test_path_independence_wrong_twin_a_prompt_of_its_own_is_told_apart():
    keys, values = tokens_of(5, 100)
    caches = [filled(reference.RecallCache(**SMALL), keys, values, cuts) for cuts in ((), range(1, 100))]
    assert caches[0].n_clustered != caches[1].n_clustered


def test_the_papers_clusters():
    """A prompt as a whole in L / 80 clusters; 320 generated tokens in 4 new ones; the old ones stay as they were."""
    keys, values = tokens_of(6, 1000 + 17 + 321)
    paper = {"budget": 600, "tokens_per_cluster": 80, "segment_size": 320, "prompt_segment_size": None, "spread": 0}
    cache = filled(reference.RecallCache(**paper), keys[:, :1017], values[:, :1017])
    prompt = cache.clusters
    assert (cache.n_clustered, prompt.counts.shape[-1]) == (1000, 13)
    alone = reference.kmeans(keys[:, 16:1016], n_clusters=13, max_iter=cache.max_iter)
    assert np.array_equal(prompt.labels, alone.labels)
    for token in range(1017, 1336):
        cache.append(keys[:, token : token + 1], values[:, token : token + 1])
        assert cache.clusters is prompt
    cache.append(keys[:, 1336:1337], values[:, 1336:1337])
    assert (cache.n_clustered, cache.clusters.counts.shape[-1]) == (1320, 17)
    assert np.array_equal(cache.clusters.labels[:, :1000], prompt.labels)
    assert np.array_equal(cache.clusters.centroids[:, :13], prompt.centroids)
    assert cache.clusters.labels[:, 1000:].min() == 13


def test_the_plan_keeps_room_for_the_exact_tokens():
    assert SegmentPlan(1024, 16, 1, 8, None, 512).segment_size == 320
    assert SegmentPlan(128, 16, 1, 8, None, 512).segment_size == 55
    with pytest.raises(ValueError, match="budget must be at least n_sink \\+ n_recent \\+ segment_size"):
        reference.RecallCache(budget=128, segment_size=320)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_prompt_within_the_budget_is_attended_to_in_full(backend):
    keys, values = tokens_of(7, 40)
    query = make_keys("normal", (2, 3, 16), DTYPES["f32"], seed=8)
    full = reference.attention(query, keys, values)
    assert equal_in_float64(filled(reference.RecallCache(**SMALL), keys, values).attend(query), full)
    cache = filled(fast.RecallCache(**SMALL, backend=backend), keys, values, convert=to_torch)
    assert attention_agrees(cache.attend(to_torch(query)), *map(to_torch, (query, keys, values)))
    keys, values = tokens_of(7, 41)
    cache = filled(fast.RecallCache(**SMALL, backend=backend), keys, values, convert=to_torch)
    assert not attention_agrees(cache.attend(to_torch(query)), *map(to_torch, (query, keys, values)))


@pytest.mark.parametrize("option", [{"centroids_for_rest": True}, {"is_centred": True}, {"spread": 0.25}])
def test_options_change_what_is_attended_to_in_both_alike(option):
    keys, values = tokens_of(9, 200, kind="smooth")
    query = make_keys("normal", (2, 3, 16), DTYPES["f32"], seed=10)
    plain, expected = (filled(reference.RecallCache(**SMALL, **o), keys, values) for o in ({}, option))
    ours = filled(fast.RecallCache(**SMALL, **option), keys, values, convert=to_torch)
    assert_same_cache(ours, expected)
    entries = expected.entries(expected.select_clusters(query))
    *mine, counts = map(to_numpy, ours.entries(ours.select_clusters(to_torch(query))))
    assert np.array_equal(counts, entries[2])
    for array, theirs in zip(mine, entries, strict=False):
        assert np.array_equal(array[counts > 0], theirs[counts > 0])
    assert attention_agrees(ours.attend(to_torch(query)), to_torch(query), *map(to_torch, entries))
    assert not np.array_equal(plain.attend(query), expected.attend(query))


@pytest.mark.parametrize("package", [reference, fast], ids=["reference", "fast"])
def test_a_refused_append_leaves_the_cache_as_it_was(package):
    convert = to_torch if package is fast else np.copy
    back = to_numpy if package is fast else np.asarray
    keys, values = tokens_of(11, 50)
    cache = filled(package.RecallCache(**SMALL), keys, values, convert=convert)
    before = back(cache.keys).tobytes(), cache.n_seen, cache.n_clustered, cache.nbytes
    bad = values.copy()
    bad[0, 0, 0] = np.nan
    for new_keys, new_values, message in (
        (keys, bad, "values must be finite"),
        (keys[:1], values[:1], "keys must fit what the cache holds"),
        (keys, values[..., :4], "values must fit what the cache holds"),
        (keys, values[:, :7], "values must have the leading axes and tokens of keys"),
        (keys.astype(np.float16), values.astype(np.float16), "keys must have the dtype of the cache, float32"),
    ):
        with pytest.raises(ValueError, match=message):
            cache.append(convert(new_keys), convert(new_values))
    assert before == (back(cache.keys).tobytes(), cache.n_seen, cache.n_clustered, cache.nbytes)


@pytest.mark.parametrize("package", [reference, fast])
def test_keys_that_might_overflow_less_their_mean_are_refused_before_they_are_held(package):
    cache, convert = package.RecallCache(**SMALL, is_centred=True), to_torch if package is fast else np.asarray
    keys = make_keys("huge", (2, 60, 16), DTYPES["f32"], seed=16)
    keys[0, 50] = 3e38
    with pytest.raises(ValueError, match=r"keys must be at most 1.7e\+38 in size with is_centred, got 3e\+38"):
        cache.append(convert(keys), convert(keys))
    assert (cache.n_seen, cache.keys) == (0, None)
    cache.append(convert(keys[:, :50]), convert(keys[:, :50]))
    assert cache.n_clustered > 0


@pytest.mark.parametrize("n_tokens", [3, 100])
def test_an_empty_query_is_refused_with_a_body_and_without(n_tokens):
    keys, values = tokens_of(17, n_tokens)
    for package, convert in ((reference, np.asarray), (fast, to_torch)):
        cache = filled(package.RecallCache(**SMALL), keys, values, convert=convert)
        with pytest.raises(ValueError, match="query must not be empty, got"):
            cache.attend(convert(keys[:, :0]))


def test_appending_a_token_copies_no_other():
    keys, values = (to_torch(array) for array in tokens_of(12, 1100))
    cache = fast.RecallCache(**{**SMALL, "budget": 700, "segment_size": 300})
    cache.append(keys[:, :1000], values[:, :1000])
    places = [array.data_ptr() for array in cache.stored]
    for token in range(1000, 1100):
        cache.append(keys[:, token : token + 1], values[:, token : token + 1])
    assert [array.data_ptr() for array in cache.stored] == places
    assert torch.equal(cache.keys, keys)
    assert cache.nbytes < cache.nbytes_reserved


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_the_batch_can_be_reordered(backend):
    keys, values = (array.reshape(3, 2, 90, 16) for array in tokens_of(13, 270))
    cache = fast.RecallCache(**SMALL, backend=backend)
    cache.append(to_torch(keys[:, :, :80]), to_torch(values[:, :, :80]))
    cache.select(torch.tensor([2, 0, 0]))
    cache.append(to_torch(keys[[2, 0, 0], :, 80:]), to_torch(values[[2, 0, 0], :, 80:]))
    expected = filled(reference.RecallCache(**SMALL), keys[[2, 0, 0]], values[[2, 0, 0]], [80])
    assert_same_cache(cache, expected)
    query = make_keys("normal", (3, 2, 4, 16), DTYPES["f32"], seed=14)
    chosen = expected.select_clusters(query)
    assert_same_bits(cache.select_clusters(to_torch(query)).taken, chosen.taken)
    assert attention_agrees(cache.attend(to_torch(query)), to_torch(query), *map(to_torch, expected.entries(chosen)))


def test_an_explicit_backend_is_never_replaced():
    keys, values = (to_torch(array) for array in tokens_of(15, 30, dim=8))
    with pytest.raises(ValueError, match="a multiple of 16, got 8 and 8, for backend 'cpp'"):
        fast.RecallCache(**SMALL, backend="cpp").append(keys, values)
    with pytest.raises(ValueError, match="backend must be 'auto', 'torch', 'triton' or 'cpp', got 'cuda'"):
        fast.RecallCache(**SMALL, backend="cuda").append(keys, values)


def test_an_empty_cache_answers():
    for package in (reference, fast):
        cache = package.RecallCache(budget=512)
        assert (cache.n_seen, cache.n_stored, cache.nbytes, cache.keys, cache.clusters) == (0, 0, 0, None, None)
        with pytest.raises(ValueError, match="attend needs at least one appended token"):
            cache.attend(None)
