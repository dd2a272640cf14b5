"""ClusterKV as published, for a whole model: two dense layers, then the reference's choices for each query head."""

import inspect

import numpy as np
import pytest
import torch
from agreement import attention_agrees
from models import greedy, random_tokens, tiny_llama
from transformers import AttentionInterface

from kvcluster import fast, reference
from kvcluster.fast.huggingface import RecallCache
from kvcluster.fast.huggingface.attention import NAME, attend
from kvcluster.fast.tiers import TieredRecallCache

PUBLISHED = {"budget": 24, "seed": 5}


def attended(model, cache, prompt, following, monkeypatch):
    """Queries and outputs of each layer for the last token."""
    heard = []

    def listening(module, query, key, value, *args, **kwargs):
        result = attend(module, query, key, value, *args, **kwargs)
        heard.append((query.clone(), result[0].clone()))
        return result

    with torch.inference_mode():
        model(prompt, past_key_values=cache)
        for token in following.split(1, dim=1):
            heard.clear()
            with monkeypatch.context() as patched:
                patched.setitem(AttentionInterface._global_mapping, NAME, listening)
                model(token, past_key_values=cache)
    return heard


@pytest.mark.parametrize("offloading", [False, True])
@pytest.mark.parametrize("decoded", [5, 320])
def test_every_query_head_attends_to_what_the_reference_recalls_for_it(decoded, offloading, monkeypatch):
    """The newest of 320 tokens still waits for its cluster while it attends."""
    model, tokens = tiny_llama(), random_tokens(300 + decoded, batch=2)
    cache = RecallCache.as_published(model, **PUBLISHED, offloading=offloading)
    heard = attended(model, cache, tokens[:, :300], tokens[:, 300:], monkeypatch)
    assert [layer.cache.caches[0].n_clustered > 0 for layer in cache.layers] == [False, False, True]
    layer, (query, output) = cache.layers[2], heard[2]
    keys, values = (x.numpy() for x in (layer.keys, layer.values))
    group, ours = query.reshape(2, 2, 2, 16), output.reshape(2, 2, 2, 16)
    expected = reference.RecallCache.as_published(budget=24, seed=5 * 3 + 2)  # of layer 2 of 3
    expected.append(keys[:, :, :300], values[:, :, :300])
    entries = [keys[:, :, :16], keys[:, :, 300:]], [values[:, :, :16], values[:, :, 300:]]
    recalled = expected.select_clusters(group.numpy()).tokens(expected.clusters)  # (batch, kv_heads, group, 24)
    assert recalled.shape[-1] == 24
    assert recalled.min() >= 0
    for place in np.ndindex(2, 2, 2):
        row, head = place[:2]
        body = 16 + recalled[place]
        arrays = [
            torch.from_numpy(np.concatenate([*(part[row, head] for part in parts), held[row, head, body]]))
            for parts, held in zip(entries, (keys, values), strict=True)
        ]
        assert len(arrays[0]) == 24 + 16 + decoded
        assert attention_agrees(ours[place][None], group[place][None], *arrays)
        assert not attention_agrees(ours[place][None], group[place][None], *(x[:-1] for x in arrays))


def test_other_seeds_and_other_layers_draw_other_tokens():
    model, tokens = tiny_llama(), random_tokens(400)
    caches = [RecallCache.as_published(model, budget=24, seed=seed) for seed in (0, 0, 1)]
    for cache in caches:
        greedy(model, tokens, past_key_values=cache)
    labels = [cache.layers[2].cache.caches[0].clusters.labels for cache in caches]
    assert torch.equal(*labels[:2])
    assert not torch.equal(*labels[1:])
    seeds = [layer.settings.init_seed for cache in caches for layer in cache.layers]
    assert seeds == [0, 1, 2, 0, 1, 2, 3, 4, 5]


def test_the_preset_is_for_model_with_the_settings_of_a_layer(tmp_path):
    model = tiny_llama()
    cache = RecallCache.as_published(model, budget=24, seed=5, offloading=True, folder=tmp_path, n_steps=2)
    assert cache.parameters["n_dense_layers"] == 2
    layers = [layer.cache.caches[0] for layer in cache.layers]
    assert [isinstance(layer, TieredRecallCache) for layer in layers] == [False, False, True]
    of_layer = vars(fast.RecallCache.as_published(budget=24, seed=5 * 3 + 2).settings)
    assert vars(layers[2].settings) == of_layer
    given = {name for name in inspect.signature(RecallCache.as_published).parameters if name != "model"}
    assert given == {
        name for name in inspect.signature(TieredRecallCache.as_published).parameters if name != "backend"
    } | {"offloading"}


def test_a_budget_that_covers_the_body_is_stock_generate_and_a_smaller_one_is_not():
    model, tokens = tiny_llama(), random_tokens(200, batch=2)
    stock = greedy(model, tokens, n_new=40)
    for budget, is_stock in ((184, True), (20, False)):
        cache = RecallCache.as_published(model, budget=budget)
        assert torch.equal(greedy(model, tokens, n_new=40, past_key_values=cache), stock) == is_stock


def test_a_model_of_one_layer_and_a_wrong_budget_are_refused():
    with pytest.raises(ValueError, match="n_dense_layers must be from 0 to the layers of model, 1, got 2"):
        RecallCache.as_published(tiny_llama(layers=1), budget=24)
    with pytest.raises(ValueError, match="budget must be at least 1, got 0"):
        RecallCache.as_published(tiny_llama(), budget=0)
    with pytest.raises(ValueError, match=r"init_seed must be below 2\*\*32, got 4294967296"):
        RecallCache.as_published(tiny_llama(), budget=24, seed=2**32)
