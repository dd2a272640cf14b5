"""RecallCache in transformers: stock where the budget covers everything, the reference's choices where it does not."""

import copy
import gc
import inspect

import numpy as np
import pytest
import torch
from agreement import attention_agrees, equal_in_float32
from models import greedy, random_tokens, tiny_llama
from transformers import AttentionInterface

from kvcluster import fast, reference
from kvcluster.fast.huggingface import ClusteredCache, RecallCache
from kvcluster.fast.huggingface.attention import NAME, attend
from kvcluster.fast.memory.segments import RecallSettings
from kvcluster.fast.tiers import TieredRecallCache

OPTIONS = {"n_sink": 4, "tokens_per_cluster": 4, "segment_size": 16, "prompt_segment_size": 32}
SMALL = {"budget": 40, **OPTIONS}


def after(model, cache, *pieces):
    """Logits after the last of `pieces`."""
    with torch.inference_mode():
        for piece in pieces:
            logits = model(piece, past_key_values=cache).logits
    return logits[0]


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_a_budget_that_covers_everything_is_stock_generate(kv_heads):
    model = tiny_llama(kv_heads=kv_heads)
    tokens = random_tokens(100, batch=2)
    cache = RecallCache.for_model(model, budget=124, **OPTIONS)
    assert torch.equal(greedy(model, tokens, past_key_values=cache), greedy(model, tokens))
    assert cache.n_seen == cache.n_stored == 123


@pytest.mark.parametrize("n_dense_layers", [0, 1])
def test_offloading_generates_the_tokens_of_memory_in_every_turn(n_dense_layers, tmp_path):
    """Greedily and by beams; the folder holds no name while the files behind the tier are in use."""
    model = tiny_llama()
    tokens, more = random_tokens(150, batch=2), random_tokens(30, batch=2)
    caches = [
        RecallCache.for_model(model, n_dense_layers=n_dense_layers, **SMALL, **options)
        for options in ({}, {"offloading": True, "folder": tmp_path, "n_steps": 2})
    ]
    first = [greedy(model, tokens, n_new=20, past_key_values=cache) for cache in caches]
    assert torch.equal(*first)
    conversation = torch.cat([tokens, first[0], more], dim=1)
    assert torch.equal(*(greedy(model, conversation, n_new=20, past_key_values=cache) for cache in caches))
    assert not any(tmp_path.iterdir())
    statistics = caches[1].statistics
    assert caches[0].statistics is None
    assert 0 < statistics.n_hits < statistics.n_asked
    assert statistics.n_asked == sum(
        layer.cache.caches[0].statistics.n_asked for layer in caches[1].layers[n_dense_layers:]
    )
    assert all(isinstance(layer.cache.caches[0], TieredRecallCache) for layer in caches[1].layers[n_dense_layers:])
    for cache in caches:
        cache.reset()
    beams = [greedy(model, tokens, n_new=20, past_key_values=cache, num_beams=3) for cache in caches]
    assert torch.equal(*beams)


@pytest.mark.parametrize("options", [{}, {"offloading": True}])
def test_a_cache_filled_in_inference_mode_goes_on_without_it(options):
    model, tokens = tiny_llama(), random_tokens(150, batch=2)
    clustered = {"keep_ratio": 0.25, "chunk_size": 16, "n_sink": 2, "n_recent": 8}
    of_both = [(RecallCache, SMALL | options)] + ([] if options else [(ClusteredCache, clustered)])
    for cache_class, parameters in of_both:
        cache, expected = (cache_class.for_model(model, **parameters) for _ in range(2))
        after(model, cache, tokens[:, :-2], tokens[:, -2:-1])  # in inference mode
        with torch.no_grad():
            model(tokens[:, :-2], past_key_values=expected)
            model(tokens[:, -2:-1], past_key_values=expected)
        assert torch.equal(*(greedy(model, tokens, past_key_values=each) for each in (cache, expected)))
        with torch.inference_mode():
            cache.reorder_cache(torch.tensor([1, 0]))
        expected.reorder_cache(torch.tensor([1, 0]))
        with torch.no_grad():
            logits = [model(tokens[:, :1], past_key_values=each).logits for each in (cache, expected)]
        assert torch.equal(*logits)


def test_offloading_options_are_refused_where_they_would_mean_nothing(tmp_path):
    model = tiny_llama()
    for options in ({"folder": tmp_path}, {"n_steps": 2}):
        with pytest.raises(ValueError, match="offloading must be True for a folder or n_steps, got "):
            RecallCache.for_model(model, **SMALL, **options)
    with pytest.raises(ValueError, match="folder must be an existing folder, got "):
        RecallCache.for_model(model, **SMALL, offloading=True, folder=tmp_path / "none")


def test_all_layers_dense_is_stock_generate_and_none_is_not():
    model = tiny_llama()
    tokens = random_tokens(100, batch=2)
    stock = greedy(model, tokens, n_new=40)
    dense = RecallCache.for_model(model, n_dense_layers=3, **SMALL)
    assert torch.equal(greedy(model, tokens, n_new=40, past_key_values=dense), stock)
    assert all(layer.cache.caches[0].n_clustered == 0 for layer in dense.layers)
    recalled = RecallCache.for_model(model, **SMALL)
    assert not torch.equal(greedy(model, tokens, n_new=40, past_key_values=recalled), stock)


@pytest.mark.parametrize("decoded", [1, 60])
def test_every_layer_attends_to_what_the_reference_recalls(decoded, monkeypatch):
    """The reference's cache of the same keys recalls some tokens; the model attended to these and no others."""
    model = tiny_llama()
    cache = RecallCache.for_model(model, **SMALL)
    tokens = random_tokens(150 + decoded, batch=2)
    heard = []

    def listening(module, query, key, value, *args, **kwargs):
        result = attend(module, query, key, value, *args, **kwargs)
        heard.append([x.clone() for x in (query, key, value, result[0])])
        return result

    after(model, cache, tokens[:, :150], *(tokens[:, i : i + 1] for i in range(150, 149 + decoded)))
    monkeypatch.setitem(AttentionInterface._global_mapping, NAME, listening)
    after(model, cache, tokens[:, -1:])
    assert len(heard) == 3
    for layer, (query, _, _, output) in zip(cache.layers, heard, strict=True):
        keys, values = layer.keys, layer.values  # in order of arrival
        expected = reference.RecallCache(**SMALL)
        expected.append(keys[:, :, :150].numpy(), values[:, :, :150].numpy())
        for token in range(150, keys.shape[2]):
            expected.append(keys[:, :, token : token + 1].numpy(), values[:, :, token : token + 1].numpy())
        group = query.reshape(2, 2, 2, 16)
        ours = output.reshape(2, 2, 2, 16)
        selection = expected.select_clusters(group.numpy())
        recalled = selection.tokens(expected.clusters)  # (batch, kv_heads, tokens), -1 pads
        first_recent = 4 + expected.n_clustered
        exact = [*range(4), *range(first_recent, keys.shape[2])]
        for place in np.ndindex(2, 2):
            chosen = [*exact, *(4 + token for token in recalled[place] if token >= 0)]
            assert len(set(chosen)) == len(chosen) == 40
            arrays = [x[place][chosen] for x in (keys, values)]
            assert attention_agrees(ours[place], group[place], *arrays)
            assert not attention_agrees(ours[place], group[place], *(x[:-1] for x in arrays))


def test_generating_never_copies_the_cache_into_the_order_of_arrival(monkeypatch):
    model = tiny_llama()
    cache = RecallCache.for_model(model, **SMALL)

    def refuse(*_):
        raise AssertionError("the whole cache was copied")

    monkeypatch.setattr(fast.RecallCache, "_in_order_of_arrival", refuse)
    greedy(model, random_tokens(150, batch=2), num_beams=2, past_key_values=cache)
    with pytest.raises(AssertionError, match="the whole cache was copied"):
        _ = cache.layers[0].keys


def test_a_second_turn_feeds_only_its_new_tokens():
    model = tiny_llama()
    tokens = random_tokens(120)
    cache = RecallCache.for_model(model, budget=200, **OPTIONS)
    first = greedy(model, tokens, past_key_values=cache)
    longer = torch.cat([tokens, first, random_tokens(10, seed=1)], dim=1)
    assert torch.equal(greedy(model, longer, past_key_values=cache), greedy(model, longer))


def test_prompts_in_a_row_after_reset_and_short_ones():
    model = tiny_llama()
    cache = RecallCache.for_model(model, **SMALL)
    for n_tokens in (1, 39, 41, 150):
        tokens = random_tokens(n_tokens, seed=n_tokens)
        fresh = RecallCache.for_model(model, **SMALL)
        ours = greedy(model, tokens, n_new=50, past_key_values=cache)
        assert torch.equal(ours, greedy(model, tokens, n_new=50, past_key_values=fresh))
        cache.reset()
        assert (cache.n_seen, cache.nbytes) == (0, 0)


def test_beams_carry_their_clusters_along():
    model = tiny_llama()
    tokens = random_tokens(60, batch=2)
    cache = RecallCache.for_model(model, budget=90, **OPTIONS)
    assert torch.equal(greedy(model, tokens, num_beams=3, past_key_values=cache), greedy(model, tokens, num_beams=3))
    cache = RecallCache.for_model(model, **SMALL)
    tokens = random_tokens(100, batch=2)
    after(model, cache, tokens)
    swapped, as_it_was = copy.deepcopy(cache), copy.deepcopy(cache)
    swapped.reorder_cache(torch.tensor([1, 0]))
    for layer, before in zip(swapped.layers, cache.layers, strict=True):
        labels, labels_before = (one.cache.caches[0].clusters.labels for one in (layer, before))
        assert torch.equal(labels, labels_before.flip(0))
        assert torch.equal(layer.keys, before.keys.flip(0))
    following = tokens[:, :1]
    with torch.inference_mode():
        expected = model(following, past_key_values=cache).logits.flip(0).numpy()
        ours, wrong = (model(following.flip(0), past_key_values=each).logits.numpy() for each in (swapped, as_it_was))
    assert equal_in_float32(ours, expected)
    assert not equal_in_float32(wrong, expected)


def test_unsupported_models_and_parameters_are_refused():
    with pytest.raises(ValueError, match="attention of model must be sdpa, got eager"):
        RecallCache.for_model(tiny_llama(attention="eager"), **SMALL)
    with pytest.raises(ValueError, match="n_dense_layers must be from 0 to the layers of model, 3, got 4"):
        RecallCache.for_model(tiny_llama(), n_dense_layers=4, **SMALL)
    with pytest.raises(ValueError, match="budget must"):
        RecallCache.for_model(tiny_llama(), budget=0)
    with pytest.raises(RuntimeError, match="attention would miss what the cache knows"):
        after(tiny_llama(), RecallCache.for_model(tiny_llama(), **SMALL), random_tokens(10))


def test_parameters_and_defaults_are_those_of_the_cache_of_a_layer():
    ours, of_layer, of_settings, of_tiers = (
        {name: parameter.default for name, parameter in inspect.signature(made).parameters.items()}
        for made in (RecallCache.for_model, fast.RecallCache, RecallSettings, TieredRecallCache)
    )
    here = {"model": inspect.Parameter.empty, "n_dense_layers": 0, "offloading": False}
    layers = (of_layer | of_tiers).items()
    assert ours == here | {name: value for name, value in layers if name not in ("backend", "settings", "is_centred")}
    assert of_settings.items() == {name: value for name, value in of_layer.items() if name != "backend"}.items()


def test_a_cache_for_the_base_model_shares_its_hooks():
    """Hooks belong to the attention modules: those of the model with a head and of the model without are the same."""
    model, tokens = tiny_llama(), random_tokens(100)
    first = RecallCache.for_model(model, **SMALL)
    second = RecallCache.for_model(model.model, **SMALL)
    del first
    model.model(tokens, past_key_values=second)
    model.model(tokens[:, :1], past_key_values=second)
    assert second.n_seen == 101
    del second
    gc.collect()
    assert all(layer.self_attn.config is model.config for layer in model.model.layers)


def test_a_model_may_change_its_attention_while_a_cache_lives():
    """Other calls run what the model was set to; the recall cache, which serves sdpa only, says so."""
    model, tokens = tiny_llama(), random_tokens(100)
    cache = RecallCache.for_model(model, **SMALL)
    model(tokens, past_key_values=cache)
    model.set_attn_implementation("eager")
    assert len(model(tokens, output_attentions=True).attentions) == 3
    with pytest.raises(ValueError, match="attention of model must be sdpa, got eager"):
        model(tokens[:, :1], past_key_values=cache)
    model.set_attn_implementation("sdpa")
    model(tokens[:, :1], past_key_values=cache)
    assert cache.n_seen == 101
