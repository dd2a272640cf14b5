"""Attended matching in models: the queries that a layer attends with are those that its cache is matched by."""

import pytest
import torch
from agreement import assert_same_bits
from models import greedy, random_tokens, tiny_llama
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from kvcluster import reference
from kvcluster.fast import Attended, Distinctive, SoftMatching
from kvcluster.fast.huggingface import ClusteredCache
from kvcluster.fast.huggingface.entry_layer import ClusteredLayer
from kvcluster.fast.vllm.settings import Settings

SIZES = {"keep_ratio": 0.3, "chunk_size": 64, "n_sink": 3, "n_recent": 50}


def queries_of(model, tokens, layer):
    """Those of a layer (batch, kv_heads, group, tokens, dim), by its own modules and transformers' rotary positions."""
    seen = {}

    def keep(module, args, kwargs):
        seen.update(kwargs, hidden=kwargs.get("hidden_states", args[0] if args else None))

    attention = model.model.layers[layer].self_attn
    handle = attention.register_forward_pre_hook(keep, with_kwargs=True)
    with torch.no_grad():
        model(tokens)
    handle.remove()
    with torch.no_grad():
        projected = attention.q_proj(seen["hidden"]).unflatten(-1, (4, 16)).transpose(1, 2)
    rotated, _ = apply_rotary_pos_emb(projected, projected, *seen["position_embeddings"])
    return rotated.unflatten(1, (2, 2))


def expected_of(model, tokens, layer, **changes):
    """The reference's cache of a layer after a prefill."""
    full = DynamicCache()
    with torch.no_grad():
        model(tokens, past_key_values=full)
    held = full.layers[layer]
    cache = reference.ClusteredCache(method=reference.Attended(), **SIZES | changes)
    cache.append(held.keys.numpy(), held.values.numpy(), queries_of(model, tokens, layer).numpy())
    return cache


def assert_same(layer, expected):
    for found, right in zip(layer.cache.caches[0].entries(), expected.entries(), strict=True):
        assert_same_bits(found, right)


@torch.no_grad()
def test_every_layer_is_matched_by_its_own_queries():
    model, tokens = tiny_llama(), random_tokens(400, batch=2)
    cache = ClusteredCache.for_model(model, method=Attended(), **SIZES)
    model(tokens, past_key_values=cache)
    for index, layer in enumerate(cache.layers):
        expected = expected_of(model, tokens, index)
        assert_same(layer, expected)
        assert layer.cache.nbytes == expected.nbytes


WRONG = {
    "no queries": lambda right, layer, query: right(layer, torch.zeros_like(query)),
    "heads dealt out": lambda right, layer, query: right(layer, query[:, [0, 2, 1, 3]]),
    "of another row": lambda right, layer, query: right(layer, query.flip(0)),
    "in another order": lambda right, layer, query: right(layer, query.flip(2)),
}


@torch.no_grad()
@pytest.mark.parametrize("name", WRONG)
def test_wrong_queries_are_told_apart(name, monkeypatch):
    right = ClusteredLayer.observe
    monkeypatch.setattr(ClusteredLayer, "observe", lambda layer, query: WRONG[name](right, layer, query))
    model, tokens = tiny_llama(), random_tokens(400, batch=2)
    cache = ClusteredCache.for_model(model, method=Attended(), **SIZES)
    model(tokens, past_key_values=cache)
    assert not torch.equal(cache.layers[0].keys, torch.from_numpy(expected_of(model, tokens, 0).keys))


@torch.no_grad()
@pytest.mark.parametrize("pieces", [[1] * 400, [250, 1, 149]], ids=["one by one", "in pieces"])
def test_no_layer_depends_on_how_tokens_arrive(pieces, monkeypatch):
    """As if all keys, values and queries that it was ever shown had come at once."""
    shown = {}
    right_update, right_observe = ClusteredLayer.update, ClusteredLayer.observe

    def update(layer, keys, values, *args, **kwargs):
        shown.setdefault(layer, []).append((keys, values))
        return right_update(layer, keys, values, *args, **kwargs)

    def observe(layer, query):
        shown[layer][-1] += (query.unflatten(1, (2, 2)),)
        right_observe(layer, query)

    monkeypatch.setattr(ClusteredLayer, "update", update)
    monkeypatch.setattr(ClusteredLayer, "observe", observe)
    model, tokens = tiny_llama(), random_tokens(400)
    cache = ClusteredCache.for_model(model, method=Attended(), **SIZES)
    for piece in tokens.split(pieces, dim=1):
        model(piece, past_key_values=cache)
    for layer in cache.layers:
        expected = reference.ClusteredCache(method=reference.Attended(), **SIZES)
        expected.append(*(torch.cat(arrays, dim=-2).numpy() for arrays in zip(*shown[layer], strict=True)))
        assert_same(layer, expected)


@torch.no_grad()
def test_rows_with_padding_are_those_of_the_rows_alone():
    model, tokens = tiny_llama(), random_tokens(400, batch=2)
    mask = torch.ones_like(tokens)
    mask[1, :100] = 0
    cache = ClusteredCache.for_model(model, method=Attended(), **SIZES)
    made = greedy_padded(model, tokens, mask, cache)
    for row, first in ((0, 0), (1, 100)):
        alone = ClusteredCache.for_model(model, method=Attended(), **SIZES)
        real = tokens[row : row + 1, first:]
        assert torch.equal(greedy(model, real, past_key_values=alone)[0], made[row])
        for mine, theirs in zip(cache.layers, alone.layers, strict=True):
            group, _ = mine.cache.of_row(row)
            assert torch.equal(group.counts, theirs.cache.caches[0].counts)


def greedy_padded(model, tokens, mask, cache):
    named = {"attention_mask": mask, "past_key_values": cache, "max_new_tokens": 24, "do_sample": False}
    return model.generate(tokens, **named, pad_token_id=0)[:, tokens.shape[1] :]


@torch.no_grad()
def test_a_saved_cache_with_a_method_for_each_layer_goes_on_as_it_was(tmp_path):
    model, tokens = tiny_llama(), random_tokens(400)
    methods = [Attended(), Distinctive(), Attended(share=0.25, n_shared=2)]
    cache = ClusteredCache.for_model(model, method=methods, bits=4, n_exact=32, **SIZES)
    model(tokens, past_key_values=cache)
    assert [layer.cache.caches[0].method for layer in cache.layers] == methods
    cache.save(tmp_path / "cache.safetensors")
    loaded = ClusteredCache.load(tmp_path / "cache.safetensors", model)
    assert loaded.parameters["method"] == methods
    more = random_tokens(200, seed=1)
    assert torch.equal(*(model(more, past_key_values=each).logits for each in (cache, loaded)))
    assert torch.equal(cache.layers[2].keys, loaded.layers[2].keys)


def test_beams_and_crop():
    model, tokens = tiny_llama(), random_tokens(200)
    sizes = {**SIZES, "n_recent": 64}
    cache = ClusteredCache.for_model(model, method=Attended(), **sizes)
    assert greedy(model, tokens, past_key_values=cache, num_beams=3, n_new=60).shape == (1, 60)
    cache, expected = (ClusteredCache.for_model(model, method=Attended(), **sizes) for _ in range(2))
    with torch.no_grad():
        for each in (cache, expected):
            model(tokens, past_key_values=each)
        model(random_tokens(70, seed=1), past_key_values=cache)
        cache.crop(-70)
    for mine, theirs in zip(cache.layers, expected.layers, strict=True):
        assert torch.equal(mine.keys, theirs.keys)
        assert torch.equal(mine.cache.caches[0].queries, theirs.cache.caches[0].queries)


def test_attention_that_shows_no_queries_is_refused():
    with pytest.raises(ValueError, match="attention of model must be sdpa, got eager"):
        ClusteredCache.for_model(tiny_llama(attention="eager"), method=Attended(), **SIZES)
    model = tiny_llama()
    cache = ClusteredCache.for_model(model, method=Attended(), **SIZES)
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="attention of model must be sdpa, got eager"), torch.no_grad():
        model(random_tokens(10), past_key_values=cache)
    with pytest.raises(ValueError, match="needs no queries, which vLLM does not show"):
        Settings(0.25, method="attended")


def test_whole_heads_are_heads_of_ratio_1():
    model, tokens = tiny_llama(), random_tokens(400)
    given = [
        {"keep_ratio": 0.3, "whole_heads": [(1, 0)]},
        {"keep_ratio": [0.3, (1.0, 0.3), 0.3]},
    ]
    caches = [ClusteredCache.for_model(model, method=Attended(), **SIZES | each) for each in given]
    with torch.no_grad():
        for cache in caches:
            model(tokens, past_key_values=cache)
    for mine, theirs in zip(*(cache.layers for cache in caches), strict=True):
        assert torch.equal(mine.keys, theirs.keys)


@pytest.mark.parametrize(
    ("method", "error", "message"),
    [
        ([Attended()], ValueError, "method must be one number or one for each of the 3 layers, got 1"),
        ([Attended(), Attended(), Attended], TypeError, "method must be a method"),
        ([SoftMatching(), SoftMatching(), Attended()], ValueError, "method must be SoftMatching"),
    ],
)
def test_wrong_methods_of_layers_are_refused(method, error, message):
    budget = {"budget": 200} if "SoftMatching" in message else {}
    with pytest.raises(error, match=message):
        ClusteredCache.for_model(tiny_llama(), method=method, **SIZES | budget)
