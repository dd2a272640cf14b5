"""The published method's cache: the same bytes in NumPy, torch, C++ and Triton, compressed when it must be."""

import math

import numpy as np
import pytest
import torch
from agreement import assert_same_bits, attention_agrees
from hypothesis import given
from hypothesis import strategies as st
from inputs import DTYPES, KINDS, make_keys, to_torch

from kvcluster import fast, reference
from kvcluster.fast.cpu.compiling import compiler
from kvcluster.fast.entry_cache import UNDO_TOKENS

SMALL = {"ratio": 0.25, "max_new_tokens": 20, "interval": 5, "chunk_size": 16, "n_sink": 3, "n_recent": 8}
HELD = ("keys", "values", "counts", "whole_keys", "whole_values")


def tokens_of(n_tokens, *, lead=(1, 3), dtype="f32", kind="smooth", seed=0):
    shapes = (*lead, n_tokens, 8), (*lead, n_tokens, 6)
    return [
        make_keys(k, shape, DTYPES[dtype], seed + i)
        for i, (k, shape) in enumerate(zip((kind, "normal"), shapes, strict=True))
    ]


def fed(cache, tokens, pieces):
    """`cache` after the tokens in pieces of these sizes."""
    convert = np.asarray if isinstance(cache, reference.ChelseaCache) else to_torch
    start = 0
    for piece in pieces:
        cache.append(*(convert(np.ascontiguousarray(x[..., start : start + piece, :])) for x in tokens))
        start += piece
    return cache


def assert_same_cache(ours, theirs):
    for name in HELD:
        if getattr(theirs, name) is None:
            assert getattr(ours, name) is None, name
        else:
            assert_same_bits(getattr(ours, name), getattr(theirs, name))
    for name in ("n_seen", "n_stored", "nbytes", "budget"):
        assert getattr(ours, name) == getattr(theirs, name), name


@given(
    pieces=st.lists(st.one_of(st.integers(0, 90), st.just(1)), min_size=1, max_size=12),
    ratio=st.sampled_from([0.05, 0.2, 0.25, 0.5, 1.0]),
    interval=st.sampled_from([0, 1, 7]),
    chunk_size=st.sampled_from([2, 5, 16]),
    n_prompt=st.sampled_from([None, 0, 60]),
    whole_heads=st.sampled_from([(), (1,), (2, 0), (0, 1, 2)]),
    dtype=st.sampled_from(list(DTYPES)),
    kind=st.sampled_from(KINDS),
)
def test_any_appends_give_the_same_bytes_in_numpy_and_torch(
    pieces, ratio, interval, chunk_size, n_prompt, whole_heads, dtype, kind
):
    changed = {"ratio": ratio, "interval": interval, "chunk_size": chunk_size, "n_prompt": n_prompt}
    plan = SMALL | changed | {"whole_heads": whole_heads}
    tokens = tokens_of(sum(pieces), dtype=dtype, kind=kind)
    assert_same_cache(
        fed(fast.ChelseaCache(**plan), tokens, pieces), fed(reference.ChelseaCache(**plan), tokens, pieces)
    )


@pytest.mark.parametrize("backend", ["torch", "cpp", "triton"])
@pytest.mark.parametrize("whole_heads", [(), (1,)], ids=["", "whole"])
def test_every_backend_has_the_same_bytes(backend, whole_heads):
    if backend == "cpp" and compiler() is None:
        pytest.skip("there is no C++ compiler")
    if backend == "triton":
        pytest.importorskip("triton")
    pieces = (70, *[1] * 9, 20)
    shapes = (1, 3, sum(pieces), 16)
    tokens = [make_keys("smooth", shapes, DTYPES["f32"], seed) for seed in (0, 1)]
    plan = SMALL | {"whole_heads": whole_heads, "chunk_size": 8}
    assert_same_cache(
        fed(fast.ChelseaCache(**plan, backend=backend), tokens, pieces),
        fed(reference.ChelseaCache(**plan), tokens, pieces),
    )


@pytest.mark.parametrize(
    "wrong",
    [
        {"interval": 6},
        {"n_prompt": 120},
        {"max_new_tokens": 0},
        {"chunk_size": 32},
        {"n_sink": 2},
        {"n_recent": 9},
        {"whole_heads": (0,)},
    ],
    ids=str,
)
def test_wrong_twins_hold_something_else(wrong):
    """Every parameter decides: a cache that ignored one would hold other bytes."""
    tokens, pieces = tokens_of(150), (100, *[1] * 50)
    right = fed(fast.ChelseaCache(**SMALL), tokens, pieces)
    with pytest.raises(AssertionError):
        assert_same_cache(right, fed(reference.ChelseaCache(**SMALL | wrong), tokens, pieces))


def test_the_budget_is_kept_from_prompt_to_end():
    tokens, budget = tokens_of(160), math.ceil(0.25 * (100 + 20))
    cache = fed(fast.ChelseaCache(**SMALL), tokens, [100])
    assert (cache.budget, cache.n_stored) == (budget, budget)
    for token in range(100, 160):
        cache.append(*(to_torch(x[:, :, token : token + 1]) for x in tokens))
        assert budget <= cache.n_stored <= budget + SMALL["interval"]
        assert (cache.counts.sum(-1) == cache.n_seen).all()
        assert_same_bits(cache.keys[:, :, :3], tokens[0][:, :, :3])
        assert_same_bits(cache.values[:, :, -8:], tokens[1][:, :, token - 7 : token + 1])


@pytest.mark.parametrize("whole_heads", [(), (0, 2)], ids=["", "whole"])
def test_attend_is_clustered_attention_to_what_each_head_stores(whole_heads):
    tokens = tokens_of(120)
    cache = fed(fast.ChelseaCache(**SMALL, whole_heads=whole_heads), tokens, [110, 10])
    query = to_torch(make_keys("normal", (1, 3, 4, 8), DTYPES["f32"], 5))
    keys, values, counts = cache.entries()
    assert attention_agrees(cache.attend(query), query, keys, values, counts)
    uniform = torch.where(counts > 0, 1, 0)  # the wrong twin: without log counts
    assert not attention_agrees(cache.attend(query), query, keys, values, uniform)


@given(
    prompt=st.integers(1, 120),
    steps=st.lists(st.sampled_from([1, 4, 9]), max_size=8),
    n_removed=st.integers(0, 9),
    whole_heads=st.sampled_from([(), (1,)]),
)
def test_a_cropped_cache_never_saw_the_tokens(prompt, steps, n_removed, whole_heads):
    """The tokens after the crop go on, too, as if the others had never come."""
    pieces = [prompt, *steps]
    plan = SMALL | {"whole_heads": whole_heads}
    tokens = tokens_of(sum(pieces) + 30)
    cache = fed(fast.ChelseaCache(**plan), tokens, pieces)
    n_removed = min(n_removed, pieces[-1], cache.n_croppable)
    cache.crop(n_removed)
    kept = [*pieces[:-1], pieces[-1] - n_removed]
    rest = [x[..., sum(pieces) :, :] for x in tokens]
    expected = fed(fast.ChelseaCache(**plan), tokens, kept)
    for both in (cache, expected):
        fed(both, rest, [7, *[1] * 12])
    for name in HELD:
        ours, theirs = getattr(cache, name), getattr(expected, name)
        assert (ours is None and theirs is None) or torch.equal(ours, theirs), name
    assert (cache.n_seen, cache.budget) == (expected.n_seen, expected.budget)


def test_what_was_compressed_for_good_is_not_cropped():
    tokens = tokens_of(UNDO_TOKENS + 100)
    cache = fed(fast.ChelseaCache(**SMALL), tokens, [UNDO_TOKENS + 40, 3])
    before = [getattr(cache, name).clone() for name in ("keys", "values", "counts")]
    with pytest.raises(ValueError, match="n_tokens must be at most 3, older tokens are compressed for good, got 4"):
        cache.crop(4)
    assert all(
        torch.equal(x, getattr(cache, name)) for x, name in zip(before, ("keys", "values", "counts"), strict=True)
    )
    cache.crop(3)
    assert cache.n_seen == UNDO_TOKENS + 40


def test_memory_of_an_undone_compression_is_counted_and_let_go():
    tokens = tokens_of(140)
    cache = fed(fast.ChelseaCache(**SMALL), tokens, [100])
    held = sum(x.untyped_storage().nbytes() for x in cache._held)
    assert cache.nbytes_reserved > held > cache.nbytes
    fed(cache, [x[:, :, 100:] for x in tokens], [1])
    assert cache.nbytes_reserved == sum(x.untyped_storage().nbytes() for x in cache._held)


@pytest.mark.parametrize("whole_heads", [(), (1,)], ids=["", "whole"])
def test_rows_are_selected_and_states_go_on(whole_heads):
    tokens, plan = tokens_of(140, lead=(2, 3)), SMALL | {"whole_heads": whole_heads}
    cache = fed(fast.ChelseaCache(**plan), tokens, [100, 3])
    cache.select(torch.tensor([1, 1]))
    twice = [np.ascontiguousarray(x[[1, 1]]) for x in tokens]
    restored = fast.ChelseaCache(**plan)
    restored.restore(*cache.state())
    rest = [x[:, :, 103:] for x in twice]
    expected = fed(reference.ChelseaCache(**plan), twice, [100, 3, *[1] * 37])
    for ours in (cache, restored):
        assert_same_cache(fed(ours, rest, [1] * 37), expected)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"ratio": 0}, ValueError, r"ratio must be in \(0, 1\], got 0"),
        ({"ratio": "half"}, TypeError, "ratio must be a number, got 'half'"),
        ({"max_new_tokens": -1}, ValueError, "max_new_tokens must be at least 0, got -1"),
        ({"max_new_tokens": 2.5}, TypeError, "max_new_tokens must be an integer, got 2.5"),
        ({"n_prompt": -1}, ValueError, "n_prompt must be at least 0, got -1"),
        ({"interval": -1}, ValueError, "interval must be at least 0, got -1"),
        ({"chunk_size": 1}, ValueError, "chunk_size must be at least 2, got 1"),
        ({"n_sink": -1}, ValueError, "n_sink must be at least 0, got -1"),
        ({"n_recent": -1}, ValueError, "n_recent must be at least 0, got -1"),
    ],
    ids=str,
)
def test_both_refuse_wrong_parameters_with_the_same_words(wrong, error, message):
    for package in (reference, fast):
        with pytest.raises(error, match=message):
            package.ChelseaCache(**SMALL | wrong)
