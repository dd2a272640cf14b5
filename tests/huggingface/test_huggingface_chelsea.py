"""The published method's cache in transformers: what it holds, which heads stay whole, what is refused."""

import warnings

import pytest
import torch
from agreement import assert_same_bits
from inputs import to_numpy
from models import greedy, random_tokens, tiny_gemma, tiny_llama

from kvcluster import reference
from kvcluster.fast import SoftMatching
from kvcluster.fast.huggingface import ChelseaCache, ClusteredCache, chelsea_cache

SMALL = {"ratio": 0.25, "max_new_tokens": 20, "interval": 3, "chunk_size": 16, "n_sink": 2, "n_recent": 8}
CLUSTERED = {"keep_ratio": 0.25, "method": SoftMatching(), "chunk_size": 16, "n_sink": 2, "n_recent": 8}
HEADS = [(0, 1), (2, 0)]


def read(model, cache, tokens, pieces=None):
    with torch.no_grad():
        for piece in tokens.split(pieces or tokens.shape[1], dim=1):
            model(piece, past_key_values=cache)
    return cache


@pytest.mark.parametrize("n_prompt", [None, 90])
def test_every_layer_holds_what_the_reference_holds(n_prompt):
    """Of the keys and values that the model makes of the prompt: as a stock cache has them."""
    model, tokens = tiny_llama(), random_tokens(90)
    plan = SMALL | {"n_prompt": n_prompt}
    stock = model(tokens, use_cache=True).past_key_values
    cache = read(model, ChelseaCache.for_model(model, **plan, whole_heads=HEADS), tokens)
    for index, (layer, full) in enumerate(zip(cache.layers, stock.layers, strict=True)):
        heads = tuple(head for of_layer, head in HEADS if of_layer == index)
        expected = reference.ChelseaCache(**plan, whole_heads=heads)
        expected.append(to_numpy(full.keys.detach()), to_numpy(full.values.detach()))
        [held] = layer.cache.caches
        for name in ("keys", "values", "counts", "whole_keys", "whole_values"):
            array = getattr(expected, name)
            assert (array is None) == (getattr(held, name) is None)
            if array is not None:
                assert_same_bits(getattr(held, name), array)
        assert layer.keys.shape[1:3] == (2, 90 if heads else held.n_stored)


def test_what_is_reported_counts_whole_heads():
    model, tokens = tiny_llama(), random_tokens(90)
    cache = read(model, ChelseaCache.for_model(model, **SMALL, whole_heads=HEADS), tokens)
    with_whole, without = cache.report().layers[0], cache.report().layers[1]
    assert without.n_stored == cache.n_stored == 28  # ceil(0.25 * (90 + 20))
    assert with_whole.n_stored == (28 + 90) / 2
    assert cache.nbytes == sum(layer.nbytes for layer in cache.report().layers)
    assert "59" in str(with_whole.n_stored)


def test_a_prompt_in_pieces_is_clustered_piece_by_piece():
    """What a `ClusteredCache` does not do; with `n_prompt` the budget is that of the whole prompt."""
    model, tokens = tiny_llama(layers=1), random_tokens(90)
    made = [
        read(model, kind(model, n), tokens, pieces)
        for kind, n in (
            (lambda model, n: ChelseaCache.for_model(model, **SMALL, n_prompt=n, whole_heads=()), 90),
            (lambda model, n: ClusteredCache.for_model(model, **CLUSTERED), None),
        )
        for pieces in (None, 37)
    ]
    at_once, in_pieces, clustered_at_once, clustered_in_pieces = made
    assert at_once.n_stored <= in_pieces.n_stored <= 28 + 3
    assert not torch.equal(at_once.layers[0].keys[:, :, :28], in_pieces.layers[0].keys[:, :, :28])
    assert clustered_at_once.n_stored == clustered_in_pieces.n_stored


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("make", [ChelseaCache, ClusteredCache])
def test_all_heads_whole_generate_the_tokens_of_stock(make, attention):
    model, tokens = tiny_llama(attention=attention), random_tokens(90)
    heads = [(layer, head) for layer in range(3) for head in range(2)]
    cache = make.for_model(model, **(SMALL if make is ChelseaCache else CLUSTERED), whole_heads=heads)
    assert torch.equal(greedy(model, tokens, past_key_values=cache), greedy(model, tokens))
    fewer = make.for_model(model, **(SMALL if make is ChelseaCache else CLUSTERED), whole_heads=heads[:1])
    assert not torch.equal(greedy(model, tokens, past_key_values=fewer), greedy(model, tokens))  # the wrong twin


def test_an_unknown_model_is_told_what_it_lacks():
    model = tiny_llama()
    with pytest.warns(UserWarning, match=r"(?s)no head stays whole, which costs most .* `kvcluster tune"):
        cache = ChelseaCache.for_model(model, **SMALL)
    assert cache.parameters["whole_heads"] == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ChelseaCache.for_model(model, **SMALL, whole_heads=())


def test_known_heads_stay_whole_by_default(monkeypatch):
    monkeypatch.setattr(chelsea_cache, "known_whole_heads", lambda model: [(1, 0)])
    model = tiny_llama()
    cache = read(model, ChelseaCache.for_model(model, **SMALL), random_tokens(90))
    assert [layer.cache.caches[0].whole_heads for layer in cache.layers] == [(), (0,), ()]


def test_layers_that_slide_stay_transformers_own():
    model = tiny_gemma()
    full = [layer for layer, kind in enumerate(model.config.layer_types) if kind == "full_attention"]
    sliding = [layer for layer, kind in enumerate(model.config.layer_types) if kind != "full_attention"]
    tokens = random_tokens(90)
    cache = ChelseaCache.for_model(model, **SMALL, whole_heads=[(full[0], 0)])
    made = greedy(model, tokens, past_key_values=cache)
    assert made.shape[1] == 24
    with pytest.raises(ValueError, match="whole_heads must be of layers that attend to all tokens"):
        ChelseaCache.for_model(model, **SMALL, whole_heads=[(sliding[0], 0)])


@pytest.mark.parametrize(
    ("heads", "error", "message"),
    [
        ([3], TypeError, "whole_heads must be pairs of a layer and a KV head, got 3"),
        ([(0, 1, 2)], TypeError, r"whole_heads must be pairs of a layer and a KV head, got \(0, 1, 2\)"),
        (["01"], TypeError, "whole_heads must be pairs of a layer and a KV head, got '01'"),
        ([(0, -1)], ValueError, "whole_heads must be at least 0, got -1"),
        ([(0, 0.5)], TypeError, "whole_heads must be an integer, got 0.5"),
        ([(3, 0)], ValueError, r"whole_heads must be of 3 layers and 2 KV heads, counted from 0, got \(3, 0\)"),
        ([(0, 2)], ValueError, r"whole_heads must be of 3 layers and 2 KV heads, counted from 0, got \(0, 2\)"),
        ([(0, 1), (0, 1)], ValueError, r"whole_heads must be different pairs, got \(0, 1\) twice"),
    ],
    ids=str,
)
@pytest.mark.parametrize("make", [ChelseaCache, ClusteredCache])
def test_what_are_no_heads_of_the_model_is_refused(make, heads, error, message):
    with pytest.raises(error, match=message):
        make.for_model(tiny_llama(), **(SMALL if make is ChelseaCache else CLUSTERED), whole_heads=heads)


def test_whole_heads_are_refused_with_a_budget_and_on_a_sharded_model():
    model = tiny_llama()
    with pytest.raises(ValueError, match=r"whole_heads must be empty with a budget, got \[\(0, 1\)\]"):
        ClusteredCache.for_model(model, **CLUSTERED, budget=60, whole_heads=[(0, 1)])
    model._tp_size = 2
    with pytest.raises(ValueError, match="whole_heads must be empty for a model whose KV heads are sharded"):
        ChelseaCache.for_model(model, **SMALL, whole_heads=HEADS)


def test_parameters_are_checked_when_the_cache_is_made():
    with pytest.raises(ValueError, match=r"ratio must be in \(0, 1\], got 2"):
        ChelseaCache.for_model(tiny_llama(), ratio=2, max_new_tokens=5, whole_heads=())
