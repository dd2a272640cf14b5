"""The real models: every decision of every layer that attends to everything; the NumPy Llama on SmolLM2's weights."""

import itertools

import numpy as np
import pytest
import torch
from agreement import assert_same_bits, logits_agree

from kvcluster import fast, reference
from kvcluster.evaluation.layers import full_layers
from kvcluster.evaluation.models import load_model
from kvcluster.evaluation.texts import load_tokens
from kvcluster.fast import SoftMatching
from kvcluster.fast.huggingface import ClusteredCache, known_profile
from kvcluster.fast.huggingface.hooks import MODEL_TYPES
from kvcluster.reference.llama import Llama

N_TOKENS = {"smollm2": 4096, "gemma3-270m": 1024}
SIZES = {"smollm2": (30, 3, 64), "gemma3-270m": (3, 1, 256)}  # layers that attend to everything, KV heads, features
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def loaded(real_model):
    return load_model(real_model, MODEL_TYPES)


@pytest.fixture(scope="module")
def full(loaded, real_model):
    """The full cache of the first tokens of the Python language reference, without the layers that slide."""
    model, tokenizer = loaded
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    tokens = load_tokens(None, tokenizer, N_TOKENS[real_model])
    with torch.inference_mode():
        cache = model(tokens, use_cache=True, logits_to_keep=1).past_key_values
    torch.set_num_threads(threads)
    return [cache.layers[index] for index in full_layers(model)[0]]


@pytest.mark.parametrize("keep_ratio", [0.5, 0.25, 0.2])
def test_no_assignment_differs_in_any_layer(full, keep_ratio, real_model):
    compared = 0
    for layer in full:
        keys = layer.keys[0]
        expected = reference.chunked_soft_matching(keys.numpy(), keep_ratio=keep_ratio)
        ours = fast.chunked_soft_matching(keys, keep_ratio=keep_ratio)
        assert_same_bits(ours.labels, expected.labels)
        assert_same_bits(ours.counts, expected.counts)
        assert_same_bits(fast.merge(keys, ours), reference.merge(keys.numpy(), expected))
        compared += expected.labels.size
    layers, kv_heads, dim = SIZES[real_model]
    assert compared == layers * kv_heads * N_TOKENS[real_model]
    assert keys.shape[-1] == dim


@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_kernels_agree_on_real_keys(full, place, few_programs, record_property):
    keys = full[{"first": 0, "middle": len(full) // 2, "last": -1}[place]].keys[0]
    kv_heads, n_tokens, _ = keys.shape
    expected = reference.chunked_soft_matching(keys.numpy(), keep_ratio=0.25, chunk_size=64)
    made = SoftMatching().compress(keys.to(DEVICE), None, chunk_size=64, target=16, backend="triton")
    first = 16 * torch.arange(n_tokens // 64)[:, None]
    labels = (made.labels.cpu().reshape(kv_heads, -1, 64) + first).reshape(kv_heads, n_tokens)
    assert_same_bits(labels, expected.labels)
    centroids = reference.merge(keys.numpy(), expected)
    assert_same_bits(made.keys.cpu().reshape(centroids.shape), centroids)
    record_property("rows", made.n_rows)


def test_the_published_cache_holds_the_same_bytes_as_the_tokens_arrive(full):
    layer = full[len(full) // 2]
    keys, values = layer.keys[0], layer.values[0]
    n_prompt = keys.shape[1] - 96
    plan = {"ratio": 0.25, "max_new_tokens": 80, "n_prompt": n_prompt, "whole_heads": (1,) if len(keys) > 1 else ()}
    names = ("keys", "values", "counts", "whole_keys", "whole_values")[: 5 if len(keys) > 1 else 3]
    held = []
    for pieces in ([n_prompt, *[1] * 96], [*[n_prompt // 8] * 8, *[1] * 96]):
        caches = reference.ChelseaCache(**plan), fast.ChelseaCache(**plan), fast.ChelseaCache(**plan, backend="torch")
        starts = np.cumsum([0, *pieces])
        for start, end in itertools.pairwise(starts):
            caches[0].append(keys[:, start:end].numpy(), values[:, start:end].numpy())
            for cache in caches[1:]:
                cache.append(keys[:, start:end], values[:, start:end])
        for name in names:
            expected = getattr(caches[0], name)
            for cache in caches[1:]:
                assert_same_bits(getattr(cache, name), expected)
        held.append(caches[0].keys.tobytes())
    assert held[0] != held[1]


def test_a_quarter_is_kept_in_little_more_of_the_bytes(loaded, full, real_model):
    model, _ = loaded
    cache = ClusteredCache.for_model(model, keep_ratio=0.25, chunk_size=64, n_recent=64, method=SoftMatching())
    for ours, layer in zip(cache.own_layers, full, strict=True):
        ours.cache.caches[0].append(layer.keys, layer.values)
    full_bytes = sum(x.untyped_storage().nbytes() for layer in full for x in (layer.keys, layer.values))
    layers, kv_heads, dim = SIZES[real_model]
    assert full_bytes == layers * kv_heads * N_TOKENS[real_model] * 2 * dim * 4
    most = {"smollm2": 0.30, "gemma3-270m": 0.35}[real_model]  # of fewer tokens, sinks and recent ones are more
    assert 0.25 * full_bytes < cache.nbytes <= most * full_bytes


def test_the_profile_that_ships_shares_out_what_is_kept(loaded, real_model):
    model, _ = loaded
    layers, kv_heads = full_layers(model)
    assert sorted(known_profile(model).heads) == [(layer, head) for layer in layers for head in range(kv_heads)]
    cache = ClusteredCache.for_model(model, keep_ratio=0.25)
    shares = {share for index in layers for share in np.ravel(cache.parameters["keep_ratio"][index]).tolist()}
    assert len(shares) > 1


@pytest.mark.slow
@pytest.mark.xdist_group("smollm2")
def test_numpy_llama_gives_transformers_logits_on_real_weights():
    model, tokenizer = load_model(None)
    tokens = load_tokens(None, tokenizer, 64)
    llama = Llama({name: weight.numpy() for name, weight in model.state_dict().items()}, model.config.to_dict())
    logits = llama.forward(tokens[0].tolist(), llama.full_caches())
    with torch.inference_mode():
        baseline = model(tokens).logits[0].numpy()
        oracle = model.double()(tokens).logits[0].numpy()
        model.float()
    assert logits_agree(logits, baseline, oracle)
    assert not logits_agree(np.roll(logits, 1, axis=0), baseline, oracle)
