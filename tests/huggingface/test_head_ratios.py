"""Ratios of single KV heads, and a recent window that grows, in models of every family; what is refused."""

import pytest
import torch
from families import MODELS, tiny
from models import greedy, random_tokens, tiny_llama

from kvcluster.fast import Attended, Distinctive, SoftMatching
from kvcluster.fast.huggingface import ClusteredCache

SMALL = {"chunk_size": 16, "n_sink": 2, "n_recent": 8}


def read(model, cache, n_tokens=150):
    with torch.no_grad():
        model(random_tokens(n_tokens), past_key_values=cache)
    return cache


@pytest.mark.parametrize(
    ("parameters", "error", "message"),
    [
        (
            {"keep_ratio": [[0.5], 0.5, 0.5]},
            ValueError,
            "keep_ratio must be one for each of the 2 KV heads, got 1 in la",
        ),
        ({"keep_ratio": [[0.5, 2.0], 0.5, 0.5]}, ValueError, r"keep_ratio must be in \(0, 1\], got 2.0"),
        ({"keep_ratio": [["a", "b"], 0.5, 0.5]}, TypeError, "keep_ratio must be a number, got 'a'"),
        (
            {"keep_ratio": [[0.5, 0.2], 0.5, 0.5], "whole_heads": [(0, 1)]},
            ValueError,
            r"keep_ratio must be one number for a layer with a budget or whole_heads \(1 is a whole head\), got \(0.5",
        ),
        (
            {"keep_ratio": [[0.5, 0.2], 0.5, 0.5], "budget": 60, "method": SoftMatching()},
            ValueError,
            "keep_ratio must be one number for a layer with a budget",
        ),
        ({"keep_ratio": 0.5, "recent_share": [0.1]}, ValueError, "recent_share must be one number or one for each of"),
        ({"keep_ratio": 0.5, "recent_share": 0.7}, ValueError, "recent_share must be at most 0.5, got 0.7"),
        (
            {"budget": 60, "recent_share": 0.1, "method": SoftMatching()},
            ValueError,
            "recent_share must be 0 with a budget, got 0.1",
        ),
    ],
)
def test_ratios_of_heads_that_cannot_be_served_are_refused(parameters, error, message):
    with pytest.raises(error, match=message):
        ClusteredCache.for_model(tiny_llama(), **parameters, **SMALL)


def test_ratios_of_heads_are_refused_on_a_sharded_model():
    model = tiny_llama()
    model._tp_size = 2
    with pytest.raises(ValueError, match="keep_ratio must be one number for a layer whose KV heads are sharded"):
        ClusteredCache.for_model(model, keep_ratio=[[0.5, 0.2], 0.5, 0.5], **SMALL)


@pytest.mark.parametrize("method", [{}, {"method": Distinctive()}, {"method": Attended()}])
def test_methods_that_choose_for_all_heads_together_are_refused_on_a_sharded_model(method):
    model = tiny_llama()
    model._tp_size = 2
    rule = (
        r"method must be SoftMatching\(\) for a model whose KV heads are sharded, as others choose tokens for all heads"
    )
    with pytest.raises(ValueError, match=rule):
        ClusteredCache.for_model(model, keep_ratio=0.5, **method)
    ClusteredCache.for_model(model, keep_ratio=0.5, method=SoftMatching())
    ClusteredCache.for_model(model, keep_ratio=1, bits=4)


def test_the_recent_window_grows_with_the_text_unless_its_size_is_given():
    model = tiny_llama()
    shares = [
        ClusteredCache.for_model(model, keep_ratio=0.5, profile=None, **parameters).parameters["recent_share"]
        for parameters in ({}, {"n_recent": 252}, {"recent_share": 0.0}, {"n_recent": 8, "recent_share": 0.25})
    ]
    assert shares == [0.05, 0.0, 0.0, 0.25]
    grows, fixed = (
        read(
            model,
            ClusteredCache.for_model(model, keep_ratio=0.5, chunk_size=8, n_sink=2, n_recent=8, recent_share=share),
        )
        for share in (0.3, 0.0)
    )
    counts = grows.layers[0].cache.caches[0].counts[0, 0]
    assert counts[-45:].tolist() == [1] * 45  # 0.3 of 150
    assert grows.n_stored > fixed.n_stored


@pytest.mark.parametrize("name", [name for name, model in MODELS.items() if model[2] != [0, 1, 2, 3]])
def test_heads_of_every_family_have_shares_of_their_own(name):
    model, sliding = tiny(name)
    ratios = [0.5 if layer in sliding else [0.2, 0.7] for layer in range(4)]
    cache = ClusteredCache.for_model(model, keep_ratio=ratios, **SMALL)
    greedy(model, random_tokens(120), n_new=20, past_key_values=cache)
    for layer in cache.own_layers:
        few, many = layer.cache.caches[0].lengths
        assert few < many < 139
    assert cache.nbytes < cache.nbytes_reserved
