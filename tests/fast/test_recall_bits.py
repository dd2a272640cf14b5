"""Recall caches with few bits: the reference's tokens and clusters, in memory or in tiers; memory is really freed."""

import itertools

import numpy as np
import pytest
import torch
from agreement import assert_same_bits, attention_agrees
from hypothesis import given
from hypothesis import strategies as st
from inputs import DTYPES, make_keys, to_torch

from kvcluster import fast, reference
from kvcluster.fast.backends import cell
from kvcluster.fast.exact.rows import nbytes_of_row
from kvcluster.fast.memory.segments import RecallSettings
from kvcluster.fast.tiers import TieredRecallCache

PLAN = {"budget": 70, "n_sink": 3, "n_recent": 2, "tokens_per_cluster": 4, "segment_size": 16}
BITS = (4, (8, 3), 2)


def tokens_of(n_tokens, *, dtype="f32", dims=(16, 16), lead=(2, 2), seed=0):
    return [make_keys("smooth", (*lead, n_tokens, dim), DTYPES[dtype], seed + i) for i, dim in enumerate(dims)]


def made(**plan):
    """The same cache in NumPy, in torch, and in tiers."""
    plan = PLAN | plan
    return reference.RecallCache(**plan), fast.RecallCache(**plan), TieredRecallCache(RecallSettings(**plan))


def feed(cache, tokens, pieces, start=0):
    convert = np.ascontiguousarray if isinstance(cache, reference.RecallCache) else to_torch
    for first, stop in itertools.pairwise(itertools.accumulate((start, *pieces))):
        cache.append(*(convert(x[..., first:stop, :]) for x in tokens))


@given(
    bits=st.sampled_from(BITS),
    dtype=st.sampled_from(list(DTYPES)),
    pieces=st.lists(st.integers(1, 90), min_size=1, max_size=4),
    prompt=st.sampled_from([0, 32, None]),
    options=st.sampled_from([{}, {"centroids_for_rest": True}, {"is_per_query_head": True}]),
)
def test_numpy_torch_and_tiers_hold_and_recall_the_same(bits, dtype, pieces, prompt, options):
    tokens = tokens_of(sum(pieces), dtype=dtype)
    theirs, ours, tiered = made(bits=bits, prompt_segment_size=prompt, **options)
    query = make_keys("normal", (2, 2, 3, 16), DTYPES[dtype], 9)
    for first, stop in itertools.pairwise(itertools.accumulate((0, *pieces))):
        for cache in (theirs, ours, tiered):
            feed(cache, tokens, [stop - first], first)
        selection, expected = ours.select_clusters(to_torch(query)), theirs.select_clusters(query)
        assert (selection is None) == (expected is None)
        if selection is not None:
            assert_same_bits(selection.taken, expected.taken)
        output = ours.attend(to_torch(query))
        assert torch.equal(tiered.attend(to_torch(query)), output)
    for cache in (ours, tiered):
        assert_same_bits(cache.keys, theirs.keys)
        assert_same_bits(cache.values, theirs.values)
    if not options:
        assert attention_agrees(output, to_torch(query), *ours.entries(selection))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("package", [reference, fast])
def test_tokens_are_quantized_alone_and_clustered_as_they_came(package, dtype):
    tokens = tokens_of(100, dtype=dtype)
    cache, exact = (package.RecallCache(**PLAN, bits=bits) for bits in ((4, 2), 16))
    for each in (cache, exact):
        feed(each, tokens, [100])
    body = slice(3, 3 + cache.n_clustered)
    assert cache.n_clustered > 60
    arrays = zip((cache.keys, cache.values), (exact.keys, exact.values), (4, 2), strict=True)
    for held, came, bits in arrays:
        held, came = (to_torch(x) if package is reference else x for x in (held, came))
        read = fast.dequantize(fast.quantize(came[..., body, :], bits=bits), 16).to(came.dtype)
        assert torch.equal(held[..., body, :], read)
        assert torch.equal(held[..., :3, :], came[..., :3, :])
        assert torch.equal(held[..., body.stop :, :], came[..., body.stop :, :])
        assert not torch.equal(read, came[..., body, :])
    for name in ("labels", "counts", "centroids"):
        ours, theirs = (np.asarray(getattr(each.clusters, name)) for each in (cache, exact))
        assert np.array_equal(ours, theirs)


def test_the_body_takes_the_bytes_of_its_bits():
    tokens = tokens_of(900, dims=(40, 64), dtype="f16")
    (theirs, ours, tiered), exact = made(bits=(4, 3)), fast.RecallCache(**PLAN)
    for cache in (theirs, ours, tiered, exact):
        feed(cache, tokens, [899, 1])
    of_token = 2 * (40 + 64) - nbytes_of_row(40, 4) - nbytes_of_row(64, 3)
    assert nbytes_of_row(40, 4) == 2 * 4 * 5
    assert ours.nbytes == exact.nbytes - 4 * ours.n_clustered * of_token
    assert tiered.nbytes == ours.nbytes
    unquantized = reference.RecallCache(**PLAN)
    feed(unquantized, tokens, [899, 1])
    assert theirs.nbytes == unquantized.nbytes - 4 * ours.n_clustered * of_token
    assert ours.nbytes_reserved < 1.2 * ours.nbytes + 4 * 2 * (40 + 64) * 2 * 70
    assert tiered.nbytes_slow < 0.5 * 4 * 900 * 2 * (40 + 64)
    before = tiered.statistics.nbytes_moved
    tiered.attend(to_torch(make_keys("normal", (2, 2, 1, 40), DTYPES["f16"], 3)))
    assert 0 < tiered.statistics.nbytes_moved - before <= 4 * 74 * (nbytes_of_row(40, 4) + nbytes_of_row(64, 3))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("pieces", [[300], [200, 60], [290, 10], [100, *[1] * 80]])
@pytest.mark.parametrize("n_removed", [1, 3, 9, 50])
def test_crop_gives_the_cache_that_never_saw_the_tokens(bits, pieces, n_removed):
    n_tokens, tokens = sum(pieces), tokens_of(sum(pieces))
    query = to_torch(make_keys("normal", (2, 2, 2, 16), DTYPES["f32"], 9))
    for ours in made(bits=bits, prompt_segment_size=0)[1:]:
        feed(ours, tokens, pieces)
        ours.attend(query)
        if n_removed > ours.n_croppable:
            with pytest.raises(ValueError, match="n_tokens must be at most"):
                ours.crop(n_removed)
            continue
        ours.crop(n_removed)
        fresh = fast.RecallCache(**PLAN, bits=bits, prompt_segment_size=0)
        feed(fresh, tokens, [n_tokens - n_removed])
        for cache in (ours, fresh):
            feed(cache, tokens, [n_removed], n_tokens - n_removed)
        assert torch.equal(ours.keys, fresh.keys)
        assert torch.equal(ours.values, fresh.values)
        assert torch.equal(ours.attend(query), fresh.attend(query))


def test_tokens_of_the_last_append_can_be_cropped_while_their_segments_are_small():
    tokens = tokens_of(900)
    ours = made(bits=4, prompt_segment_size=64)[1]
    feed(ours, tokens, [800])
    assert ours.n_croppable >= 256
    assert ours.nbytes_reserved > ours.nbytes + 4 * 256 * 2 * 16 * 4  # exact tokens are kept for it
    feed(ours, tokens, [1], 800)
    assert ours.n_croppable == 1  # and go with the next append
    whole = made(bits=4, prompt_segment_size=None)[1]
    feed(whole, tokens, [900])
    assert whole.n_croppable == 0  # one segment of 895 tokens is not kept
    with pytest.raises(ValueError, match="n_tokens must be at most 0, "):
        whole.crop(1)


@pytest.mark.parametrize("bits", BITS)
def test_state_and_rows_carry_what_is_quantized(bits):
    tokens, query = tokens_of(200), to_torch(make_keys("normal", (2, 2, 2, 16), DTYPES["f32"], 9))
    _, ours, tiered = made(bits=bits)
    for cache in (ours, tiered):
        feed(cache, tokens, [150, 50])
        restored = made(bits=bits)[1]
        restored.restore(*cache.state())
        assert torch.equal(restored.keys, cache.keys)
        assert torch.equal(restored.attend(query), cache.attend(query))
        rows = torch.tensor([1, 1, 0])
        expected = cache.attend(query)[rows]
        cache.select(rows)
        assert torch.equal(cache.attend(query[rows]), expected)
        more = [x[[1, 1, 0]] for x in tokens_of(40, seed=5)]
        feed(cache, more, [40])
        assert torch.equal(cache.keys[0], cache.keys[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [16, 48, 64])
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_rows_in_cpp_are_those_of_torch(dtype, dim, bits):
    array = to_torch(make_keys("smooth", (2, 77, dim), DTYPES[dtype], dim + bits))
    rows = cell("pack_rows", "torch")(array, bits)
    assert rows.shape == (2, 77, nbytes_of_row(dim, bits))
    assert torch.equal(cell("pack_rows", "cpp")(array, bits), rows)
    read = cell("unpack_rows", "torch")(rows, dim)
    assert torch.equal(read, fast.dequantize(fast.quantize(array, bits=bits), dim))
    assert torch.equal(cell("unpack_rows", "cpp")(rows, dim), read)
    assert not torch.equal(cell("unpack_rows", "cpp")(rows.flip(-1), dim), read)  # the wrong twin


@pytest.mark.parametrize("package", [reference, fast])
@pytest.mark.parametrize(
    ("bits", "error", "message"),
    [
        (5, ValueError, "bits must be 16, or 8, 4, 3 or 2 for both or for keys and values, got 5"),
        ((4, 16), ValueError, r"bits must be 16, or 8, 4, 3 or 2 .* got \(4, 16\)"),
        ("4", TypeError, "bits must be an integer, or one for keys and one for values, got '4'"),
        (True, TypeError, "bits must be an integer"),
    ],
)
def test_bits_that_cannot_be_served_are_refused(package, bits, error, message):
    with pytest.raises(error, match=message):
        package.RecallCache(**PLAN, bits=bits)


@pytest.mark.parametrize("package", [reference, fast])
def test_numbers_that_cannot_be_quantized_lose_nothing(package):
    cache = package.RecallCache(**PLAN, bits=4)
    feed(cache, tokens_of(100), [100])
    before = np.asarray(cache.keys).copy()
    large = [np.full((2, 2, 5, 16), 2e38, dtype=np.float32), np.ones((2, 2, 5, 16), dtype=np.float32)]
    for name, arrays in (("keys", large), ("values", large[::-1])):
        with pytest.raises(ValueError, match=rf"{name} must be at most 1.7e\+38 in size to be quantized, got 2e\+38"):
            feed(cache, arrays, [5])
    assert cache.n_seen == 100
    assert np.array_equal(np.asarray(cache.keys), before)
