"""The transformers cache: what generate makes of it, layer by layer, and what it leaves behind (nothing)."""

import copy
import gc

import numpy as np
import pytest
import torch
from agreement import assert_same_bits, logits_agree
from caches import of_reference
from inputs import to_numpy
from models import greedy, random_tokens, tiny_llama
from transformers import DynamicCache

from kvcluster.fast import SoftMatching
from kvcluster.fast.huggingface import ClusteredCache
from kvcluster.reference.llama import Llama

PARAMETERS = {"keep_ratio": 0.25, "chunk_size": 16, "n_sink": 2, "n_recent": 8, "method": SoftMatching()}


def hooks_on(model):
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_keep_ratio_one_is_stock_generate(kv_heads, attention):
    model = tiny_llama(kv_heads=kv_heads, attention=attention)
    tokens = random_tokens(100, batch=2)
    cache = ClusteredCache.for_model(model, **PARAMETERS | {"keep_ratio": 1})
    assert torch.equal(greedy(model, tokens, past_key_values=cache), greedy(model, tokens))
    assert cache.n_seen == cache.n_stored == 123


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_generated_tokens_are_those_of_the_numpy_llama(kv_heads, attention):
    """End to end: a clustered cache in transformers and one in the reference lead to the same text."""
    model = tiny_llama(kv_heads=kv_heads, attention=attention)
    tokens = random_tokens(100, batch=2)
    ours = greedy(model, tokens, n_new=40, past_key_values=ClusteredCache.for_model(model, **PARAMETERS))
    llama = Llama({name: weight.numpy() for name, weight in model.state_dict().items()}, model.config.to_dict())
    for row in range(2):
        caches = [of_reference(**PARAMETERS) for _ in range(3)]
        assert llama.generate(tokens[row].tolist(), 40, caches) == ours[row].tolist()
    assert not torch.equal(ours, greedy(model, tokens, n_new=40))  # clustering made a difference


def test_every_layer_holds_what_the_reference_makes_of_its_keys():
    """The keys of a full cache, clustered by the reference, give the bits of the clustered cache."""
    model = tiny_llama()
    tokens = random_tokens(150, batch=2)
    cache = ClusteredCache.for_model(model, **PARAMETERS)
    with torch.inference_mode():
        full = model(tokens, use_cache=True).past_key_values
        model(tokens, past_key_values=cache)
    for full_layer, layer in zip(full.layers, cache.layers, strict=True):
        expected = of_reference(**PARAMETERS)
        expected.append(full_layer.keys.numpy(), full_layer.values.numpy())
        for name in ("keys", "values", "counts"):
            assert_same_bits(getattr(layer.cache.caches[0], name), getattr(expected, name))


def logits_after(model, cache, tokens):
    with torch.inference_mode():
        return model(tokens, past_key_values=cache).logits[0].numpy()


def stock_logits(cache, following):
    """Stock transformers on what `cache` holds: plain layer caches, positions told, log counts in a mask made here."""
    model = tiny_llama(attention="eager")
    queries, stored = following.shape[1], cache.n_stored
    stock = DynamicCache(config=model.config)
    hidden = model.model.embed_tokens(following)
    positions = cache.n_seen + torch.arange(queries)[None]
    rotary = model.model.rotary_emb(hidden, position_ids=positions)
    for index, layer in enumerate(model.model.layers):
        entries = cache.layers[index].cache.caches[0]
        stock.update(entries.keys, entries.values, index)
        counts = entries.counts.repeat_interleave(2, dim=1).float()  # (batch, heads, entries)
        mask = torch.full((1, 4, queries, stored + queries), -torch.inf).triu(stored + 1)
        mask[..., :stored] = counts.log()[:, :, None]
        hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary, past_key_values=stock)
    return model.lm_head(model.model.norm(hidden))[0].numpy()


@pytest.mark.parametrize("queries", [1, 7])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_log_counts_and_positions_reach_attention(queries, attention):
    """The next logits agree with the NumPy Llama's on the same entries; without log counts or positions they do not."""
    model = tiny_llama(attention=attention)
    prompt, following = random_tokens(150).split([150 - queries, queries], dim=1)
    cache = ClusteredCache.for_model(model, **PARAMETERS)
    logits_after(model, cache, prompt)
    llama = Llama({name: weight.numpy() for name, weight in model.state_dict().items()}, model.config.to_dict())
    reference_caches = []
    for layer in cache.layers:
        made = of_reference(**PARAMETERS)
        made.keys, made.values, made.counts = (
            getattr(layer.cache.caches[0], name)[0].numpy() for name in ("keys", "values", "counts")
        )
        made.n_seen, made.n_clustered, made._n_body = (
            getattr(layer.cache.caches[0], name) for name in ("n_seen", "n_clustered", "n_body")
        )
        reference_caches.append(made)
    oracle = llama.forward(following[0].tolist(), reference_caches)
    subject = logits_after(model, copy.deepcopy(cache), following)
    with torch.inference_mode():
        baseline = stock_logits(cache, following)
    assert logits_agree(subject, baseline, oracle)

    shifted = copy.deepcopy(cache)
    for layer in shifted.layers:
        layer.cache.caches[0].n_seen += 1
    assert not logits_agree(logits_after(model, shifted, following), baseline, oracle)
    forgetful = copy.deepcopy(cache)
    for layer in forgetful.layers:
        layer.cache.caches[0].counts[:] = 1
    assert not logits_agree(logits_after(model, forgetful, following), baseline, oracle)


def test_nothing_stays_on_the_model():
    model = tiny_llama()
    tokens = random_tokens(100)
    stock = greedy(model, tokens)
    cache = ClusteredCache.for_model(model, **PARAMETERS)
    other = ClusteredCache.for_model(model, **PARAMETERS)
    copied = copy.deepcopy(cache)
    assert hooks_on(model) == 8  # shared: two on each of 3 layers, two on the model
    assert [layer.self_attn.config._attn_implementation for layer in model.model.layers] == ["kvcluster"] * 3
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(greedy(model, tokens), stock)  # a stock cache is left alone
    del cache, other
    gc.collect()
    assert hooks_on(model) == 8
    del copied
    gc.collect()
    assert hooks_on(model) == 0
    assert all(layer.self_attn.config is model.config for layer in model.model.layers)


def test_a_copied_model_adds_log_counts_once():
    """Copying a model copies its hooks; a cache made for the copy brings its own."""
    model = tiny_llama()
    tokens = random_tokens(100)
    cache = ClusteredCache.for_model(model, **PARAMETERS)
    copied = copy.deepcopy(model)
    cache_of_copy = ClusteredCache.for_model(copied, **PARAMETERS)
    assert hooks_on(copied) == 2 * hooks_on(model)
    ours = greedy(copied, tokens, past_key_values=cache_of_copy)
    assert torch.equal(ours, greedy(model, tokens, past_key_values=cache))


def test_a_cache_on_a_model_it_was_not_made_for_is_refused():
    """Its log counts would not reach attention, which nobody would notice."""
    model, stranger = tiny_llama(), tiny_llama()
    cache = ClusteredCache.for_model(model, **PARAMETERS)
    logits_after(model, cache, random_tokens(100))
    with pytest.raises(RuntimeError, match="attention would miss what the cache knows"):
        logits_after(stranger, cache, random_tokens(1))


def test_a_call_that_failed_halfway_is_not_continued():
    model = tiny_llama()
    tokens = random_tokens(100)
    cache = ClusteredCache.for_model(model, **PARAMETERS)
    logits_after(model, cache, tokens)
    weight = model.model.layers[1].self_attn.k_proj.weight.data
    right = weight.clone()
    weight[:] = torch.nan
    with pytest.raises(ValueError, match="keys must be finite"):
        logits_after(model, cache, tokens[:, :1])
    weight[:] = right
    with pytest.raises(RuntimeError, match="the layers of the cache must have seen the same tokens, got 100 to 101"):
        logits_after(model, cache, tokens[:, :1])
    cache.reset()
    logits_after(model, cache, tokens)


def test_autocast_changes_no_decision():
    """Inside autocast a matrix product would be less exact than the filter claims."""
    model = tiny_llama().to(torch.bfloat16)
    tokens = random_tokens(400)
    cache = ClusteredCache.for_model(model, **PARAMETERS)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        full = model(tokens, use_cache=True).past_key_values
        model(tokens, past_key_values=cache)
    for full_layer, layer in zip(full.layers, cache.layers, strict=True):
        expected = of_reference(**PARAMETERS)
        expected.append(to_numpy(full_layer.keys), to_numpy(full_layer.values))
        for name in ("keys", "values", "counts"):
            assert_same_bits(getattr(layer.cache.caches[0], name), getattr(expected, name))


def test_beams_carry_their_caches_along():
    """With keep_ratio 1 beam search gives stock's result: rows are reordered with their counts."""
    model = tiny_llama()
    tokens = random_tokens(60, batch=2)
    stock = greedy(model, tokens, num_beams=3)
    kept = ClusteredCache.for_model(model, **PARAMETERS | {"keep_ratio": 1})
    assert torch.equal(greedy(model, tokens, num_beams=3, past_key_values=kept), stock)
    cache = ClusteredCache.for_model(model, **PARAMETERS)
    logits_after(model, cache, tokens)
    rows = torch.tensor([1, 1, 0])
    before = [(layer.keys, layer.values, layer.cache.caches[0].counts) for layer in cache.layers]
    cache.reorder_cache(rows)
    for layer, (keys, values, counts) in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.keys, keys[rows])
        assert torch.equal(layer.values, values[rows])
        assert torch.equal(layer.cache.caches[0].counts, counts[rows])
    cache.batch_repeat_interleave(2)
    assert cache.layers[0].keys.shape[0] == 6
    cache.batch_select_indices(torch.tensor([0]))
    assert cache.layers[0].keys.shape[0] == 1


def test_reset_empties():
    model = tiny_llama()
    tokens = random_tokens(60)
    cache = ClusteredCache.for_model(model, **PARAMETERS)
    logits_after(model, cache, tokens)
    cache.reset()
    assert (cache.n_seen, cache.n_stored, cache.nbytes) == (0, 0, 0)
    fresh = ClusteredCache.for_model(model, **PARAMETERS)
    assert np.array_equal(logits_after(model, cache, tokens), logits_after(model, fresh, tokens))


def test_generate_goes_on_from_a_cache():
    """A second turn feeds only the new tokens, at their positions."""
    model = tiny_llama()
    tokens = random_tokens(120)
    cache = ClusteredCache.for_model(model, **PARAMETERS | {"keep_ratio": 1})
    first = greedy(model, tokens, past_key_values=cache)
    longer = torch.cat([tokens, first, random_tokens(10, seed=1)], dim=1)
    assert torch.equal(greedy(model, longer, past_key_values=cache), greedy(model, longer))


def test_bytes_are_those_of_the_tensors_held():
    model = tiny_llama()
    cache = ClusteredCache.for_model(model, **PARAMETERS)
    logits_after(model, cache, random_tokens(500))
    assert cache.nbytes == 3 * 2 * cache.n_stored * (16 * 4 + 16 * 4 + 4)
    room = max(PARAMETERS["chunk_size"], cache.n_stored // 32)
    assert cache.nbytes_reserved <= cache.nbytes * (cache.n_stored + 2 * room) / cache.n_stored
    assert cache.n_stored / cache.n_seen < 0.3


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"keep_ratio": 0}, r"keep_ratio must be in \(0, 1\], got 0"),
        ({"keep_ratio": 0.5, "chunk_size": 0}, "chunk_size must be at least 1, got 0"),
        ({"keep_ratio": 0.5, "n_sink": -1}, "n_sink must be at least 0, got -1"),
        ({"keep_ratio": 0.5, "n_recent": -1}, "n_recent must be at least 0, got -1"),
        ({}, "keep_ratio, bytes_ratio or budget must be given, got none of them"),
        ({"keep_ratio": [0.5, 0.5]}, "keep_ratio must be one number or one for each of the 3 layers, got 2"),
        ({"budget": [300]}, "budget must be one number or one for each of the 3 layers, got 1"),
        (
            {"budget": 100, "method": SoftMatching()},
            r"budget must be at least .*, got 100 < 4 \+ 252 \+ 256 - 1 \+ 256 = 767",
        ),
        ({"budget": 1000}, r"method must be SoftMatching\(\) with a budget, which merges all tokens, got Dist"),
        ({"keep_ratio": 0.5, "n_dense_layers": 4}, "n_dense_layers must be from 0 to the layers of model, 3, got 4"),
    ],
)
def test_parameters_out_of_range_are_refused(parameters, message):
    with pytest.raises(ValueError, match=message):
        ClusteredCache.for_model(tiny_llama(), **parameters)


def test_unsupported_models_are_refused():
    with pytest.raises(ValueError, match=r"model must be of type llama or mistral or .* or gemma3_text, got Linear"):
        ClusteredCache.for_model(torch.nn.Linear(1, 1), keep_ratio=0.5)
    model = tiny_llama()
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="attention of model must be sdpa or eager, got flex_attention"):
        ClusteredCache.for_model(model, keep_ratio=0.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_models_generate(dtype):
    model = tiny_llama().to(dtype)
    tokens = random_tokens(100)
    kept = ClusteredCache.for_model(model, **PARAMETERS | {"keep_ratio": 1})
    assert torch.equal(greedy(model, tokens, past_key_values=kept), greedy(model, tokens))
    cache = ClusteredCache.for_model(model, **PARAMETERS)
    greedy(model, tokens, past_key_values=cache)
    assert cache.layers[0].keys.dtype == dtype
    assert cache.n_stored < cache.n_seen


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("parameters", "ratios", "budgets"),
    [
        ({"keep_ratio": [0.5, 0.25, 1.0]}, [0.5, 0.25, 1.0], [None] * 3),
        ({"keep_ratio": 0.25, "n_dense_layers": 1}, [1.0, 0.25, 0.25], [None] * 3),
        ({"budget": [60, 80, 1000]}, [1.0] * 3, [60, 80, 1000]),
        ({"keep_ratio": 0.5, "budget": 60, "n_dense_layers": 2}, [1.0, 1.0, 0.5], [None, None, 60]),
    ],
)
def test_every_layer_has_its_own_ratio_and_budget(parameters, ratios, budgets, attention):
    """What each holds is the reference's; the second turn, which needs a mask, agrees with the NumPy Llama's."""
    model = tiny_llama(attention=attention)
    shared = {"chunk_size": 16, "n_sink": 2, "n_recent": 8, "method": SoftMatching()}
    chosen = [{"keep_ratio": r, "budget": b, **shared} for r, b in zip(ratios, budgets, strict=True)]
    prompt, second = random_tokens(150), random_tokens(7, seed=1)
    cache = ClusteredCache.for_model(model, **parameters, **shared)
    llama = Llama({name: weight.numpy() for name, weight in model.state_dict().items()}, model.config.to_dict())
    reference_caches = [of_reference(**each) for each in chosen]
    for turn in (prompt, second, random_tokens(1, seed=2)):
        oracle = llama.forward(turn[0].tolist(), reference_caches)
        ours = logits_after(model, cache, turn)
        assert np.array_equal(ours.argmax(-1), oracle.argmax(-1))
        assert [layer.cache.n_stored for layer in cache.layers] == [each.n_stored for each in reference_caches]
    assert cache.n_stored == max(layer.cache.n_stored for layer in cache.layers)
    assert all(b is None or layer.cache.n_stored <= b for layer, b in zip(cache.layers, budgets, strict=True))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_budget_that_holds_all_tokens_is_stock_generate(attention):
    model = tiny_llama(attention=attention)
    tokens = random_tokens(200, batch=2)
    cache = ClusteredCache.for_model(model, budget=223, chunk_size=64, n_recent=64, method=SoftMatching())
    assert torch.equal(greedy(model, tokens, past_key_values=cache), greedy(model, tokens))
    smaller = ClusteredCache.for_model(model, budget=222, chunk_size=64, n_recent=64, method=SoftMatching())
    greedy(model, tokens, past_key_values=smaller)
    assert cache.n_stored == 223
    assert smaller.n_stored <= 222
