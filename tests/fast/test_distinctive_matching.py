"""Distinctive matching: who stays exact, who shares an entry; NumPy and torch to the bit."""

import importlib
import inspect
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from agreement import assert_same_bits, equal_in_float32
from caches import make_cache
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import DTYPES, KINDS, make_keys, to_numpy, to_torch
from patches import twin_of

from kvcluster import fast, reference
from kvcluster.reference.distinctive_matching import distinctiveness

PAGE = (Path(__file__).resolve().parents[2] / "reference" / "SPECIFICATION.md").read_text()
MODULE = importlib.import_module("kvcluster.reference.distinctive_matching")  # the name alone is the function
SETTINGS = {"keep_ratio": 0.4, "chunk_size": 20, "n_shared": 3}


def pair(kind, shape, dtype=DTYPES["f32"], seed=0):
    return make_keys(kind, shape, dtype, seed), make_keys(kind, shape, dtype, seed + 1)


def by_torch(keys, values, **rules):
    made = fast.distinctive_matching(to_torch(keys), to_torch(values), **rules)
    return made.labels.numpy(), made.counts.numpy()


@pytest.mark.parametrize("scores", ["C++", "torch"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_fast_path_has_the_same_bits(kind, dtype, scores, monkeypatch):
    """Also of two layouts, and of scores by torch alone, as where there is no compiler."""
    if scores == "torch":
        monkeypatch.setattr("kvcluster.fast.backends.has_cpp", lambda name: False)
    for number, (shape, rules) in enumerate(
        [
            ((2, 3, 67, 16), SETTINGS),
            ((3, 64, 80), {"keep_ratio": 0.25, "chunk_size": 64}),
            ((40, 7), {"keep_ratio": 0.1, "chunk_size": 8, "n_shared": 1}),
            ((1, 2, 130, 64), {"keep_ratio": 0.5, "chunk_size": 65, "n_shared": 40}),
        ]
    ):
        keys, values = pair(kind, shape, DTYPES[dtype], seed=number)
        expected = reference.distinctive_matching(keys, values, **rules)
        labels, counts = by_torch(keys, values, **rules)
        assert np.array_equal(labels, expected.labels)
        assert np.array_equal(counts, expected.counts)
        strided = [to_torch(array).mT.contiguous().mT for array in (keys, values)]
        assert np.array_equal(fast.distinctive_matching(*strided, **rules).labels.numpy(), expected.labels)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_sizes_have_the_same_bits(data):
    heads, tokens, dim = (data.draw(st.integers(1, most)) for most in (3, 90, 20))
    rules = {
        "keep_ratio": data.draw(st.sampled_from([0.05, 0.2, 0.5, 0.9, 1.0])),
        "chunk_size": data.draw(st.integers(1, 40)),
        "n_shared": data.draw(st.integers(1, 6)),
    }
    keys, values = pair(data.draw(st.sampled_from(KINDS)), (2, heads, tokens, dim), seed=data.draw(st.integers(0, 99)))
    expected = reference.distinctive_matching(keys, values, **rules)
    labels, counts = by_torch(keys, values, **rules)
    assert np.array_equal(labels, expected.labels)
    assert np.array_equal(counts, expected.counts)


def test_clusterings_are_partitions():
    keys, values = pair("normal", (2, 3, 67, 16))
    made = reference.distinctive_matching(keys, values, **SETTINGS)
    assert made.counts.shape == (2, 3, 3 * 8 + 7)
    assert (made.counts.sum(axis=-1) == 67).all()
    for problem in np.ndindex(2, 3):
        assert np.array_equal(np.bincount(made.labels[problem]), made.counts[problem])
    assert np.array_equal(made.labels[..., 60:], np.broadcast_to(np.arange(24, 31), (2, 3, 7)))  # the trailing part
    whole = reference.distinctive_matching(keys, values, **SETTINGS | {"keep_ratio": 1})
    assert np.array_equal(whole.labels, np.broadcast_to(np.arange(67), (2, 3, 67)))
    nothing = reference.distinctive_matching(keys[..., :0, :], values[..., :0, :], **SETTINGS)
    assert nothing.labels.shape == nothing.counts.shape == (2, 3, 0)
    for lead in ((0, 3), (2, 0)):
        keys, values = pair("normal", (*lead, 67, 16))
        expected = reference.distinctive_matching(keys, values, **SETTINGS)
        assert [array.shape for array in by_torch(keys, values, **SETTINGS)] == [(*lead, 67), (*lead, 31)]
        assert expected.labels.shape == (*lead, 67)


def test_distinctive_tokens_stay_exact_in_all_heads():
    """A phrase that points elsewhere keeps its tokens; the rest of each head shares entries by likeness of keys."""
    rng = np.random.default_rng(0)
    keys, values = (rng.standard_normal((3, 40, 16)).astype(np.float32) * 0.1 + 1 for _ in range(2))
    keys[:, 11:14], values[:, 11:14] = -1, -1
    made = reference.distinctive_matching(keys, values, keep_ratio=0.25, chunk_size=40, n_shared=3)
    assert (made.counts[:, :7] == 1).all()
    assert (made.counts[:, 7:].sum(axis=-1) == 33).all()
    exact = made.labels[0] < 7
    assert exact[9:16].all()  # the phrase and its neighbours
    assert all(np.array_equal(labels < 7, exact) for labels in made.labels)
    for head in range(3):
        rest = keys[head][~exact].astype(np.float64)
        rest /= np.linalg.norm(rest, axis=-1, keepdims=True)
        assert np.array_equal(made.labels[head][~exact] - 7, (rest @ rest[[0, 11, 22]].T).argmax(axis=-1))


def test_scores_by_hand():
    """Two heads of five tokens on two axes. Every number here can be found with a pencil."""
    east, west, north = (1, 0), (-1, 0), (0, 1)
    keys = np.float32([[east, east, east, east, west], [north] * 5])
    values = np.float32([[east] * 5, [north, north, north, west, west]])
    # head 0: the mean key points east: 0 0 0 0 2. Head 1: the mean value is (-0.4, 0.6), with squared cosines
    # 0.36 / 0.52 to north and 0.16 / 0.52 to west; as float32 numbers these are not exact
    in_heads = [0, 0, 0, 0, 2], [1 - 0.36 / 0.52] * 3 + [1 - 0.16 / 0.52] * 2
    total = np.sum(in_heads, axis=0)
    expected = [total[:4].mean(), total.mean(), total.mean(), total.mean(), total[1:].mean()]
    assert equal_in_float32(np.float32(distinctiveness(keys, values)), np.float32(expected))


WRONG = {
    "keys only": ("likeness_to_mean(values[head])", "0.0"),
    "values only": ("likeness_to_mean(keys[head])", "0.0"),
    "each head for itself": ("total = total + (", "total = ("),
    "no moving average": ("range(WINDOW)", "range(3, 4)"),
    "the likeliest": ("np.argsort(-distinctiveness", "np.argsort(distinctiveness"),
    "ordinary tokens in reverse": (
        "np.setdiff1d(np.arange(len(keys)), exact)",
        "np.setdiff1d(np.arange(len(keys)), exact)[::-1]",
    ),
    "the first tokens as destinations": ("* len(ordinary) // n_shared", ""),
    "destinations may leave": ("match[destinations] = np.arange(n_shared)", "pass"),
    "one shared entry less": ("return target - n_shared, n_shared", "return target - n_shared + 1, n_shared - 1"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_twins_are_told_apart(name):
    twin = twin_of(MODULE, WRONG[name])
    are_same = []
    for keys, values in (pair("normal", (2, 3, 67, 16)), pair("smooth", (2, 3, 67, 16)), [np.ones((67, 8), "f4")] * 2):
        made = twin["distinctive_matching"](keys, values, **SETTINGS)
        are_same.append(np.array_equal(by_torch(keys, values, **SETTINGS)[0], made.labels))
    assert not all(are_same)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pieces", [(150,), (1,) * 150, (70, 3, 77)], ids=["once", "singly", "pieces"])
def test_caches_hold_what_the_function_says(pieces, dtype):
    """However tokens arrive: reference and fast path hold the same bytes, of merged chunks and exact ends."""
    rules = {**SETTINGS, "n_sink": 2, "n_recent": 9}
    keys, values = pair("normal", (2, 3, 150, 16), DTYPES[dtype])
    slow, quick = make_cache(reference, **rules), make_cache(fast, **rules)
    first = 0
    for size in pieces:
        part = (array[..., first : first + size, :] for array in (keys, values))
        keys_, values_ = part
        slow.append(keys_, values_)
        quick.append(to_torch(keys_), to_torch(values_))
        first += size
    for name in ("keys", "values", "counts"):
        assert_same_bits(getattr(quick, name), getattr(slow, name))
    body = slice(2, 2 + slow.n_clustered)
    clustering = reference.distinctive_matching(keys[..., body, :], values[..., body, :], **SETTINGS)
    n_body = clustering.counts.shape[-1]
    expected = reference.merge(keys[..., body, :], clustering).astype(keys.dtype)
    assert slow.keys[..., 2 : 2 + n_body, :].tobytes() == expected.tobytes()
    assert np.array_equal(slow.counts[..., 2 : 2 + n_body], clustering.counts)
    assert slow.values[..., -9:, :].tobytes() == values[..., -9:, :].tobytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_shared": 0}, "n_shared must be at least 1, got 0"),
        ({"chunk_size": 0}, "chunk_size must be at least 1, got 0"),
        ({"keep_ratio": 0}, r"keep_ratio must be in \(0, 1\], got 0"),
    ],
)
def test_bad_numbers_are_refused_with_the_same_words(change, message):
    keys, values = pair("normal", (3, 40, 4))
    with pytest.raises(ValueError, match=message):
        reference.distinctive_matching(keys, values, **SETTINGS | change)
    with pytest.raises(ValueError, match=message):
        fast.distinctive_matching(to_torch(keys), to_torch(values), **SETTINGS | change)


def test_bad_arrays_are_refused_with_the_same_words():
    keys, values = pair("normal", (3, 40, 4))
    wrong = values.copy()
    wrong[0, 0, 0] = np.nan
    for values_, message in (
        (values[:, 1:], "values must have the leading axes and tokens"),
        (wrong, "must be finite"),
    ):
        with pytest.raises(ValueError, match=message):
            reference.distinctive_matching(keys, values_, **SETTINGS)
        with pytest.raises(ValueError, match=message):
            fast.distinctive_matching(to_torch(keys), to_torch(values_), **SETTINGS)


@pytest.mark.parametrize("backend", [reference, fast])
def test_what_is_no_method_is_refused(backend):
    with pytest.raises(ValueError, match="n_shared must be at least 1, got 0"):
        backend.Distinctive(n_shared=0)
    for wrong in (None, "distinctive", backend.Distinctive, 4):
        message = f"method must be a method such as SoftMatching() or Distinctive(n_shared=4), got {wrong!r}"
        with pytest.raises(TypeError, match=re.escape(message)):
            backend.ClusteredCache(keep_ratio=0.5, method=wrong)


def test_defaults_are_those_of_the_specification():
    parameters = inspect.signature(reference.distinctive_matching).parameters.values()
    text = re.search(r"(?m)^\*\*16\.1\*\* (.*)$", PAGE)[1]
    given = {f"{p.name}={p.default}" for p in parameters if p.default is not p.empty}
    assert set(re.findall(r"`(\w+=\d+)`", text)) == given


@pytest.mark.parametrize("dim", [7, 8])  # without and with C++
def test_no_gradient_and_no_change_of_the_input(dim):
    keys, values = (torch.randn(2, 40, dim, requires_grad=True) for _ in range(2))
    before = to_numpy(keys.detach().clone())
    made = fast.distinctive_matching(keys, values, **SETTINGS)
    assert not made.labels.requires_grad
    assert_same_bits(keys.detach(), before)
