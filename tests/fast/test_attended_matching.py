"""Attended matching: what the next tokens look at stays exact; caches that are given queries; to the bit."""

import importlib
import itertools

import numpy as np
import pytest
import torch
from agreement import assert_same_bits
from inputs import DTYPES, KINDS, make_keys, to_torch
from patches import twin_of

from kvcluster import fast, reference
from kvcluster.fast import recent_queries
from kvcluster.fast.backends import cell
from kvcluster.reference.attended_matching import attention_margins

MODULE = importlib.import_module("kvcluster.reference.attended_matching")  # the name alone is the function
RULES = {"keep_ratio": 0.4, "chunk_size": 20, "n_shared": 3}
CACHE = {"keep_ratio": 0.3, "chunk_size": 64, "n_sink": 3, "n_recent": 50}
RATIOS = (1.0, 0.3, 0.5)


def arrays(kind, shape, chunk_size, *, dtype="f32", n_queries=4, seed=0):
    """Keys, values, and queries of whole chunks."""
    of_chunks = (*shape[:-2], shape[-2] // chunk_size, n_queries, shape[-1])
    keys, values = (make_keys(kind, shape, DTYPES[dtype], seed + i) for i in range(2))
    return keys, values, make_keys("normal", of_chunks, DTYPES[dtype], seed + 2)


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_fast_path_has_the_same_bits(kind, dtype, backend):
    shapes = [(2, 3, 67, 16), (3, 64, 80), (40, 7), (1, 2, 130, 64)]
    plans = [RULES, {"keep_ratio": 0.25, "chunk_size": 64}, {"keep_ratio": 0.1, "chunk_size": 8, "share": 1.0}]
    plans += [{"keep_ratio": 0.5, "chunk_size": 65, "n_shared": 40, "share": 0.3}]
    for number, (shape, rules) in enumerate(zip(shapes, plans, strict=True)):
        given = arrays(kind, shape, rules["chunk_size"], dtype=dtype, seed=number)
        expected = reference.attended_matching(*given, **rules)
        found = fast.attended_matching(*map(to_torch, given), **rules, backend=backend)
        assert np.array_equal(found.labels.numpy(), expected.labels)
        assert np.array_equal(found.counts.numpy(), expected.counts)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [16, 48, 128, 272])
def test_margins_have_the_same_bits(dim, dtype):
    """Also of keys that are no copy, and of equal products."""
    for kind, seed in itertools.product(("normal", "duplicates"), (0, 1)):
        keys = make_keys(kind, (3, 2 * 37, dim), DTYPES[dtype], seed)[:, ::2]
        queries = make_keys("normal", (3, 5, dim), DTYPES[dtype], seed + 9)
        expected = attention_margins(np.ascontiguousarray(keys), queries)
        for backend in ("torch", "cpp"):
            found = cell("attention_margins", backend)(to_torch(keys), to_torch(queries))
            assert np.array_equal(found.numpy(), expected)


def test_margins_by_brute_force():
    keys, _, queries = (np.rint(4 * array) for array in arrays("normal", (30, 8), 30, n_queries=6))
    dots = queries[0] @ keys.T  # (queries, tokens): of whole numbers, exact
    expected = [max(row[t] - max(np.delete(row, t)) for row in dots) for t in range(30)]
    assert np.array_equal(attention_margins(keys, queries[0]), expected)


def test_half_is_attended_and_half_is_distinctive():
    """Each head keeps the tokens that its own queries ask for; all keep the phrase that stands out."""
    rng = np.random.default_rng(0)
    keys, values = (rng.standard_normal((2, 40, 16)).astype(np.float32) * 0.1 + 1 for _ in range(2))
    keys[:, 20:27], values[:, 20:27] = -1, -1
    asked = ((2, 31), (5, 36))
    for head, tokens in enumerate(asked):
        for axis, token in enumerate(tokens):
            keys[head, token, axis] += 5
    queries = np.broadcast_to(np.eye(16, dtype=np.float32)[:2], (2, 1, 2, 16))
    made = reference.attended_matching(keys, values, queries, keep_ratio=0.15, chunk_size=40, n_shared=2)  # 4 exact
    for labels, tokens in zip(made.labels, asked, strict=True):
        exact = np.flatnonzero(labels < 4)
        assert set(tokens) <= set(exact)
        assert sum(20 <= token < 27 for token in exact) == 2


def test_without_a_share_it_is_distinctive_matching():
    keys, values, queries = arrays("smooth", (2, 3, 67, 16), 20)
    made = reference.attended_matching(keys, values, queries, **RULES, share=0)
    expected = reference.distinctive_matching(keys, values, **RULES)
    assert np.array_equal(made.labels, expected.labels)


def test_neither_the_order_of_queries_nor_their_scale_decides():
    keys, values, queries = arrays("normal", (2, 3, 67, 16), 20)
    expected = reference.attended_matching(keys, values, queries, **RULES).labels
    for changed in (queries[..., ::-1, :], queries * np.float32(8), np.repeat(queries, 2, axis=-2)):
        assert np.array_equal(reference.attended_matching(keys, values, changed, **RULES).labels, expected)


WRONG = {
    "softmax weights": ("dots - np.where(is_best, second[..., None], best[..., None])", "np.exp(dots)"),
    "compared with itself": ("np.where(is_best, second[..., None], best[..., None])", "best[..., None]"),
    "averaged": (").max(axis=-2)\n    return margins", ").mean(axis=-2)\n    return margins"),
    "least attended": ("np.argsort(-margins[head]", "np.argsort(margins[head]"),
    "rounded up": ("math.floor", "math.ceil"),
    "queries of another chunk": ("queries[..., chunk, :, :]", "queries[..., 0, :, :]"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_twins_are_told_apart(name):
    twin = twin_of(MODULE, WRONG[name])
    are_same = []
    for kind in ("normal", "smooth"):
        given = arrays(kind, (2, 3, 67, 16), 20)
        made = twin["attended_matching"](*given, **RULES)
        are_same.append(np.array_equal(fast.attended_matching(*map(to_torch, given), **RULES).labels, made.labels))
    assert not all(are_same)


def tokens(*lead, n=400, dim=16, group=2, seed=0):
    rng = np.random.default_rng(seed)
    keys, values = rng.standard_normal((2, *lead, n, dim)).astype(np.float32)
    return keys, values, rng.standard_normal((*lead, group, n, dim)).astype(np.float32)


def fed(cache, given, pieces):
    """`cache` after the tokens, so many at once."""
    is_torch = type(cache).__module__.startswith("kvcluster.fast")
    for start, stop in itertools.pairwise(itertools.accumulate((0, *pieces))):
        part = [array[..., start:stop, :] for array in given]
        cache.append(*(map(to_torch, part) if is_torch else part))
    return cache


def make(package, kind, **changes):
    rules = {**CACHE, "method": package.Attended(), **changes}
    if kind == "RaggedCache":
        rules = {**rules, "keep_ratios": RATIOS}
        del rules["keep_ratio"]
    return getattr(package, kind)(**rules)


def assert_same(cache, expected):
    for found, right in zip(cache.entries(), expected.entries(), strict=True):
        assert_same_bits(torch.as_tensor(found), np.asarray(right))
    assert (cache.n_seen, cache.nbytes) == (expected.n_seen, expected.nbytes)


SIZES = [{}, {"chunk_size": 37}, {"chunk_size": 20, "n_sink": 0}, {"recent_share": 0.4}, {"bits": 4}]
SIZES += [{"bits": 3, "n_exact": 32, "n_recent": 64}]


@pytest.mark.parametrize("kind", ["ClusteredCache", "RaggedCache"])
@pytest.mark.parametrize("changes", SIZES, ids=str)
def test_caches_do_not_depend_on_how_tokens_arrive(kind, changes):
    given = tokens(2, 3)
    expected = fed(make(reference, kind, **changes), given, [400])
    for package, pieces in (
        (reference, [1] * 100 + [300]),
        (fast, [400]),
        (fast, [13] * 30 + [10]),
        (fast, [0, 399, 1]),
    ):
        assert_same(fed(make(package, kind, **changes), given, pieces), expected)


WRONG_CACHES = {
    "sampled from each append's first token": ("(-2, sampled)", "(-2, sampled - sampled[0])"),
    "the token before": ("(-2, sampled)", "(-2, sampled - 1)"),
    "the chunk's own queries": ("* (1 + chunks)", "* chunks"),
    "all recent tokens": ("(ends + self.n_recent) // QUERY_STEP", "self.n_sampled(self.n_seen) + 0 * ends"),
    "heads and chunks exchanged": (".movedim(-4, -3)", ""),
}


@pytest.mark.parametrize("name", WRONG_CACHES)
def test_wrong_twins_of_caches_are_told_apart(name, monkeypatch):
    wrong = twin_of(recent_queries, WRONG_CACHES[name])["RecentQueries"]
    monkeypatch.setattr(recent_queries, "RecentQueries", wrong)
    given = tokens(2, 3)
    cache, expected = (fed(make(package, "ClusteredCache"), given, [400]) for package in (fast, reference))
    assert not torch.equal(cache.keys, torch.from_numpy(expected.keys))


@pytest.mark.parametrize("lead", [(), (3,), (0, 3)])
def test_any_leading_axes(lead):
    given = tokens(*lead)
    cache, expected = (fed(make(package, "ClusteredCache"), given, [250, 150]) for package in (fast, reference))
    assert_same(cache, expected)
    assert expected.queries.shape == (*lead, 2, 0, 16)
    assert fed(make(reference, "ClusteredCache", recent_share=0.5), given, [400]).queries.shape == (*lead, 2, 4, 16)


def test_a_chunk_is_matched_by_the_queries_behind_it():
    """Those of tokens 31 and 63 behind the sinks' and the chunk's end, and of no others."""
    given = tokens(3)
    sizes = {"chunk_size": 64, "n_sink": 3, "n_recent": 100}
    expected = fed(reference.ClusteredCache(keep_ratio=0.3, method=reference.Attended(), **sizes), given, [400])
    others = given[2].copy()
    positions = np.arange(400) - 3
    others[..., (positions % 32 != 31) | (positions < 64), :] = 7
    assert_same(fed(make(fast, "ClusteredCache", **sizes), (*given[:2], others), [400]), expected)
    changed = given[2].copy()
    changed[..., 3 + 64 + 31, :] = 7
    other = fed(make(fast, "ClusteredCache", **sizes), (*given[:2], changed), [400])
    assert not np.array_equal(other.keys, expected.keys)
    span = slice(3, 3 + 64)
    queries = given[2][..., [3 + 64 + 31, 3 + 64 + 63, 3 + 64 + 95], :].reshape(3, 1, 6, 16)
    by_hand = reference.attended_matching(given[0][:, span], given[1][:, span], queries, keep_ratio=0.3, chunk_size=64)
    assert np.array_equal(expected.counts[:, 3:23], by_hand.counts)


@pytest.mark.parametrize("kind", ["ClusteredCache", "RaggedCache"])
@pytest.mark.parametrize("changes", [{}, {"bits": 4, "n_exact": 32, "n_recent": 64}], ids=str)
def test_crop_undoes_what_was_clustered(kind, changes):
    given = tokens(2, 3, n=500)
    expected = fed(make(fast, kind, **changes), given, [400])
    cache = fed(make(fast, kind, **changes), given, [350, 50, 100])
    cache.crop(100)
    assert_same(cache, expected)
    for each in (cache, expected):
        fed(each, tokens(2, 3, n=200, seed=1), [150, 50])
    assert_same(cache, expected)


@pytest.mark.parametrize("kind", ["ClusteredCache", "RaggedCache"])
def test_queries_that_nothing_needs_are_freed(kind):
    """After a long prompt at once, which cannot be undone; after a short one `crop` may need them."""
    given = tokens(2, 3, n=2000)
    cache, pieces = (fed(make(fast, kind), given, sizes) for sizes in ([2000], [1900, 100]))
    assert cache._queries.held.shape == cache.queries.shape
    assert cache._queries.held.untyped_storage().nbytes() == cache.queries.nbytes
    assert pieces._queries.held.shape[-2] > pieces.queries.shape[-2]
    assert torch.equal(pieces.queries, cache.queries)


@pytest.mark.parametrize("kind", ["ClusteredCache", "RaggedCache"])
def test_selected_and_restored_caches_go_on_alike(kind):
    given = tokens(2, 3)
    cache, more = fed(make(fast, kind), given, [390, 10]), tokens(2, 3, n=150, seed=1)
    restored = make(fast, kind)
    restored.restore(*cache.state())
    cache.select(torch.tensor([1, 0]))
    swapped = [array[[1, 0]] for array in given]
    for each, new in ((cache, [array[[1, 0]] for array in more]), (restored, more)):
        fed(each, new, [150])
    assert_same(restored, fed(fed(make(reference, kind), given, [400]), more, [150]))
    assert_same(cache, fed(fed(make(reference, kind), swapped, [400]), [x[[1, 0]] for x in more], [150]))


@pytest.mark.parametrize("package", [reference, fast], ids=["reference", "fast"])
def test_wrong_queries_are_refused_and_nothing_is_lost(package):
    convert = to_torch if package is fast else np.copy
    keys, values, queries = tokens(3, n=100)
    cache = make(package, "ClusteredCache")
    fed(cache, (keys, values, queries), [100])
    wrong = {
        "must be given": None,
        "group, tokens, dim": queries[..., :5, :],
        "groups of 2": queries[:, :1, :7],
        "dtype of keys": queries[..., :7, :].astype(np.float16),
        "finite": np.where(np.arange(16) == 3, np.nan, queries[..., :7, :]).astype(np.float32),
    }
    for message, given in wrong.items():
        with pytest.raises(ValueError, match=message):
            cache.append(*map(convert, (keys[:, :7], values[:, :7])), given if given is None else convert(given))
    with pytest.raises(ValueError, match="keys must be finite"):
        cache.append(*map(convert, (keys[:, :7] * np.inf, values[:, :7], queries[..., :7, :])))
    more = tokens(3, n=200, seed=2)
    assert_same(
        fed(cache, more, [200]),
        fed(fed(make(reference, "ClusteredCache"), (keys, values, queries), [100]), more, [200]),
    )
    without = make(package, "ClusteredCache", method=package.Distinctive())
    with pytest.raises(ValueError, match="queries must be None"):
        without.append(*map(convert, (keys, values, queries)))
    with pytest.raises(ValueError, match="n_recent must be at least 32"):
        make(package, "ClusteredCache", n_recent=31)
    with pytest.raises(ValueError, match="whole_heads must be empty"):
        make(package, "ClusteredCache", whole_heads=(0,))
    for share, error in ((1.5, ValueError), (-0.1, ValueError), ("half", TypeError)):
        with pytest.raises(error, match="share must be"):
            package.Attended(share)


def test_clustering_without_the_queries_of_all_tokens_is_refused():
    keys, values, queries = map(to_torch, tokens(3))
    cache = make(fast, "ClusteredCache")
    cache.extend(keys, values)
    with pytest.raises(RuntimeError, match="queries of all 400 tokens, got those of 0"):
        cache.cluster()
    cache.observe(queries)
    cache.cluster()
    assert_same(cache, fed(make(reference, "ClusteredCache"), tokens(3), [400]))
