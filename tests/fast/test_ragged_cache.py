"""Heads that keep shares of their own: bit for bit the reference's, in one buffer, and croppable as any cache."""

import itertools

import numpy as np
import pytest
import torch
from agreement import assert_same_bits, attention_agrees
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import DTYPES, make_keys, to_torch

from kvcluster import fast, reference
from kvcluster.fast.backends import implementation
from kvcluster.fast.entry_cache import UNDO_TOKENS
from kvcluster.fast.methods import compress_heads

SMALL = {"chunk_size": 10, "n_sink": 3, "n_recent": 7}
RATIOS = (0.3, 1.0, 0.3, 0.55)
METHODS = ["SoftMatching", "Distinctive"]


def tokens_of(n_tokens, *, lead=(1, 4), dtype="f32", seed=0, dims=(8, 6)):
    return [make_keys("smooth", (*lead, n_tokens, dim), DTYPES[dtype], seed + dim) for dim in dims]


def make(package, method="SoftMatching", **plan):
    return package.RaggedCache(method=getattr(package, method)(), **{"keep_ratios": RATIOS} | SMALL | plan)


def fed(cache, pieces, tokens):
    """The cache after these appends, and what the last of them returned."""
    returned = None
    convert = np.ascontiguousarray if isinstance(cache, reference.RaggedCache) else to_torch
    for start, stop in itertools.pairwise(itertools.accumulate((0, *pieces))):
        returned = cache.append(*(convert(x[..., start:stop, :]) for x in tokens))
    return cache, returned


def assert_same_entries(ours, theirs):
    for array, expected in zip(ours, theirs, strict=True):
        assert_same_bits(array, expected)


@given(
    method=st.sampled_from(METHODS),
    pieces=st.lists(st.integers(0, 60), min_size=1, max_size=5),
    ratios=st.sampled_from([RATIOS, (1.0,) * 4, (0.2,) * 4, (0.1, 0.9, 0.5, 0.25)]),
    recent_share=st.sampled_from([0.0, 0.3, 0.5]),
    dtype=st.sampled_from(list(DTYPES)),
)
def test_any_split_gives_the_same_bytes_in_numpy_and_torch(method, pieces, ratios, recent_share, dtype):
    tokens, plan = tokens_of(sum(pieces), dtype=dtype), {"keep_ratios": ratios, "recent_share": recent_share}
    theirs, returned = fed(make(reference, method, **plan), pieces, tokens)
    ours, ours_returned = fed(make(fast, method, **plan), pieces, tokens)
    at_once, _ = fed(make(reference, method, **plan), [sum(pieces)], tokens)
    assert_same_entries(ours.entries() or (), theirs.entries() or ())
    assert_same_entries(ours_returned, returned)
    for array, expected in zip(at_once.entries() or (), theirs.entries() or (), strict=True):
        assert array.tobytes() == expected.tobytes()
    assert (ours.nbytes, ours.lengths, ours.n_seen) == (theirs.nbytes, theirs.lengths, theirs.n_seen)


@pytest.mark.parametrize("backend", ["torch", "triton", "auto"])
@pytest.mark.parametrize("method", METHODS)
def test_every_backend_has_the_bytes_of_the_reference(method, backend, few_programs):
    tokens = tokens_of(70, dims=(16, 16))
    theirs, _ = fed(make(reference, method), [60, 10], tokens)
    ours, _ = fed(make(fast, method, backend=backend), [60, 10], tokens)
    assert_same_entries(ours.entries(), theirs.entries())
    wrong, _ = fed(make(fast, method, backend=backend, keep_ratios=RATIOS[::-1]), [60, 10], tokens)
    with pytest.raises(AssertionError):  # the wrong twin: shares of other heads
        assert_same_entries(wrong.entries(), theirs.entries())


@pytest.mark.parametrize("method", METHODS)
def test_each_head_is_that_of_a_cache_with_its_ratio(method):
    tokens = tokens_of(90)
    cache, _ = fed(make(fast, method), [90], tokens)
    keys, values, counts = cache.entries()
    for head, ratio in enumerate(RATIOS):
        alike = reference.ClusteredCache(keep_ratio=ratio, method=getattr(reference, method)(), **SMALL)
        alike.append(*tokens)
        for ours, expected in ((keys, alike.keys), (values, alike.values), (counts, alike.counts)):
            assert_same_bits(ours[:, head, -alike.n_stored :], np.ascontiguousarray(expected[:, head]))
        assert not counts[:, head, : -alike.n_stored].any()


def test_memory_is_that_of_the_entries_of_each_head():
    cache, _ = fed(make(fast), [1000], tokens_of(1000))
    entry = 4 * (8 + 6 + 1)  # float32 numbers, an int32 count
    assert cache.lengths == tuple(int(1000 - 99 * (10 - n)) for n in (3, 10, 3, 6))
    assert cache.nbytes == sum(cache.lengths) * entry
    assert cache.nbytes < cache.nbytes_reserved < 1.1 * cache.nbytes + 4000
    assert cache.mean_entries == sum(cache.lengths) / 4


@pytest.mark.parametrize("lead", [(4,), (2, 4), (2, 3, 4)], ids=str)
def test_attend_is_attention_of_each_head_to_what_it_keeps(lead):
    tokens = tokens_of(90, lead=lead)
    theirs, _ = fed(make(reference), [50, 40], tokens)
    cache, _ = fed(make(fast), [50, 40], tokens)
    query = to_torch(make_keys("normal", (*lead, 3, 8), DTYPES["f32"], 9))
    keys, values, counts = cache.entries()
    assert attention_agrees(cache.attend(query), query, keys, values, counts)
    assert np.array_equal(theirs.attend(query.numpy()), reference.clustered_attention(query.numpy(), *theirs.entries()))
    swapped = keys[..., [1, 0, 2, 3], :, :]  # the wrong twin: heads in another order
    assert not attention_agrees(cache.attend(query), query, swapped, values, counts)


@settings(max_examples=40)
@given(
    method=st.sampled_from(METHODS),
    ratios=st.sampled_from([RATIOS, (1.0,) * 4]),
    steps=st.lists(st.tuples(st.booleans(), st.integers(1, 80), st.floats(0, 1)), min_size=1, max_size=7),
)
def test_any_appends_and_crops_leave_the_cache_of_the_tokens_that_are_left(method, ratios, steps):
    cache, left, last = make(fast, method, keep_ratios=ratios), tokens_of(0), 0
    alike = fast.ClusteredCache(keep_ratio=min(ratios), **SMALL)
    for seed, (is_crop, n_new, share) in enumerate(steps):
        if is_crop:
            assert min(last, cache.n_seen) <= cache.n_croppable == alike.n_croppable <= cache.n_seen
            n_tokens = round(share * cache.n_croppable)
            cache.crop(n_tokens)
            alike.crop(n_tokens)
            n_left = left[0].shape[-2] - n_tokens
            left, last = [x[..., :n_left, :] for x in left], max(0, last - n_tokens)
        else:
            new, last = tokens_of(n_new, seed=seed), n_new
            cache.append(*map(to_torch, new))
            alike.append(*map(to_torch, new))
            left = [np.concatenate(pair, axis=-2) for pair in zip(left, new, strict=True)]
    expected, _ = fed(make(reference, method, keep_ratios=ratios), [left[0].shape[-2]], left)
    if cache.n_seen:
        assert_same_entries(cache.entries(), expected.entries())
    assert cache.lengths == expected.lengths


def test_what_earlier_appends_clustered_is_clustered_for_good():
    cache, _ = fed(make(fast), [UNDO_TOKENS + 100], tokens_of(UNDO_TOKENS + 100))
    before = [array.clone() for array in cache.entries()]
    n_most = cache.n_croppable
    with pytest.raises(ValueError, match=f"n_tokens must be at most {n_most}, older tokens are clustered for good"):
        cache.crop(n_most + 1)
    for array, expected in zip(cache.entries(), before, strict=True):
        assert torch.equal(array, expected)


@pytest.mark.parametrize("n_tokens", [0, 5, 90])
def test_a_cache_goes_on_from_its_state(n_tokens):
    first, later = tokens_of(n_tokens, lead=(2, 4)), tokens_of(40, lead=(2, 4), seed=50)
    cache, _ = fed(make(fast), [n_tokens] if n_tokens else [], first)
    other = make(fast)
    other.restore(*cache.state())
    for each in (cache, other):
        each.append(*map(to_torch, later))
    for ours, theirs in zip(other.entries(), cache.entries(), strict=True):
        assert torch.equal(ours, theirs)


def test_rows_are_selected_in_their_order():
    cache, _ = fed(make(fast), [88], tokens_of(88, lead=(3, 4)))
    rows = torch.tensor([2, 0, 0])
    expected = [array[rows] for array in cache.entries()]
    cache.select(rows)
    cache.crop(cache.n_croppable)  # what can be undone is that of these rows too
    again, _ = fed(make(fast), [cache.n_seen], [x[[2, 0, 0], :, : cache.n_seen] for x in tokens_of(88, lead=(3, 4))])
    for ours, theirs in zip(cache.entries(), again.entries(), strict=True):
        assert torch.equal(ours, theirs)
    assert not torch.equal(expected[0][0], expected[0][1])


def test_a_refused_append_leaves_the_cache_as_it_was():
    for package, convert in ((reference, np.asarray), (fast, to_torch)):
        cache, _ = fed(make(package), [60], tokens_of(60))
        before = cache.entries()
        keys, values = map(convert, tokens_of(5, lead=(1, 3)))
        message = r"keep_ratios must be one for each head of keys, 3, got 4 for keys of shape \(1, 3, 5, 8\)"
        with pytest.raises(ValueError, match=message if package is reference else "must fit what the cache holds"):
            cache.append(keys, values)
        with pytest.raises(ValueError, match=message):
            make(package).append(keys, values)
        keys, values = map(convert, tokens_of(5))
        keys[0, 0, 0, 0] = float("nan")
        with pytest.raises(ValueError, match="keys must be finite, got 1 NaN or infinite values"):
            cache.append(keys, values)
        assert cache.n_seen == 60
        for array, expected in zip(cache.entries(), before, strict=True):
            assert bool((array == expected).all())


def test_an_empty_cache_answers():
    for package, convert in ((reference, np.asarray), (fast, to_torch)):
        cache = make(package)
        assert (cache.n_seen, cache.lengths, cache.nbytes, cache.entries()) == (0, (0, 0, 0, 0), 0, None)
        with pytest.raises(ValueError, match="attend needs at least one appended token, got an empty cache"):
            cache.attend(convert(np.ones((1, 4, 1, 8), dtype=np.float32)))


@pytest.mark.parametrize(
    ("plan", "error", "message"),
    [
        ({"keep_ratios": 0.5}, TypeError, "keep_ratios must be a sequence of numbers, one for each head, got 0.5"),
        ({"keep_ratios": ()}, TypeError, "keep_ratios must be a sequence of numbers"),
        ({"keep_ratios": "0.5"}, TypeError, "keep_ratios must be a sequence of numbers"),
        ({"keep_ratios": (0.5, 0.0)}, ValueError, r"keep_ratios must be in \(0, 1\], got 0"),
        ({"keep_ratios": (0.5, True)}, TypeError, "keep_ratios must be a number, got True"),
        ({"chunk_size": 0}, ValueError, "chunk_size must be at least 1, got 0"),
        ({"n_sink": -1}, ValueError, "n_sink must be at least 0, got -1"),
        ({"n_recent": 0.5}, TypeError, "n_recent must be an integer, got 0.5"),
        ({"recent_share": 0.6}, ValueError, "recent_share must be at most 0.5, got 0.6"),
        ({"recent_share": -0.1}, ValueError, r"recent_share must be in \[0, 1\], got -0.1"),
        ({"recent_share": None}, TypeError, "recent_share must be a number, got None"),
    ],
)
def test_wrong_parameters_are_refused(plan, error, message):
    for package in (reference, fast):
        with pytest.raises(error, match=message):
            make(package, **plan)


BACKENDS = ["torch", "cpp", "triton"]


def ragged_problem(lengths, *, queries, dtype, dim=32, group=3, batch=2):
    """Query rows, and keys, values and counts of heads that lie one behind the other with gaps between them."""
    rng = np.random.default_rng(0)
    firsts = tuple(itertools.accumulate((2, *(n + 3 for n in lengths[:-1]))))
    query = rng.standard_normal((batch, len(lengths), group * queries, dim))
    keys, values = rng.standard_normal((2, batch, firsts[-1] + lengths[-1] + 5, dim))
    counts = rng.integers(1, 100, keys.shape[:2]).astype(np.int32)
    for first, n in zip(firsts, lengths, strict=True):
        counts[:, first + n - queries : first + n] = 1
    arrays = [*(x.astype(DTYPES[dtype]) for x in (query, keys, values)), counts]
    return *map(to_torch, arrays), firsts


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("lengths", "queries"), [((70, 3, 300), 1), ((40, 300), 5), ((2100, 8), 2)])
def test_attention_to_heads_of_any_lengths_is_within_the_bound(backend, dtype, lengths, queries, few_programs):
    query, keys, values, counts, firsts = ragged_problem(lengths, queries=queries, dtype=dtype)
    attend = implementation("attend_ragged", backend, query, keys, values)

    def agrees(output, shift=0):
        return all(
            attention_agrees(
                output[:, head, token::queries],
                query[:, head, token::queries],
                *(x[:, first + shift : first + shift + n - queries + token + 1] for x in (keys, values, counts)),
            )
            for head, (first, n) in enumerate(zip(firsts, lengths, strict=True))
            for token in range(queries)
        )

    scale = query.shape[-1] ** -0.5
    output = attend(query, keys, values, counts, lengths, firsts, queries, scale)
    assert output.dtype == query.dtype
    assert agrees(output)
    assert not agrees(output, shift=1)  # wrong twins: entries of the wrong places, too few of them, heads confused
    fewer = tuple(-(-n // 2) for n in lengths)
    assert not agrees(attend(query, keys, values, counts, fewer, firsts, min(queries, min(fewer)), scale))
    assert not agrees(attend(query.flip(1), keys, values, counts, lengths, firsts, queries, scale))


class Halves:
    """A method without a `compress_heads` of its own."""

    def compress(self, keys, values, *, chunk_size, target, backend="auto"):
        return fast.SoftMatching().compress(keys, values, chunk_size=chunk_size, target=target)


def test_a_method_without_its_own_way_is_asked_for_all_heads():
    keys, values = map(to_torch, tokens_of(40, lead=(2, 4)))
    rules = {"chunk_size": 10, "heads_of_target": {3: [0, 2], 6: [3]}}
    general = compress_heads(Halves(), keys, values, **rules)
    own = compress_heads(fast.SoftMatching(), keys, values, **rules)
    for (heads, chunks), (same_heads, expected) in zip(general, own, strict=True):
        assert heads == same_heads
        for name in ("labels", "counts", "keys", "values"):
            assert torch.equal(getattr(chunks, name), getattr(expected, name)), name
