"""Recall caches of whole models with few bits: generation, files, tiers, what the report says."""

import pytest
import torch
from models import greedy, random_tokens, tiny_llama
from transformers import DynamicCache

from kvcluster.fast.huggingface import RecallCache

PLAN = {"budget": 80, "n_sink": 4, "segment_size": 16}
MODES = {"greedy": {}, "beams": {"num_beams": 3}, "prompt-lookup": {"prompt_lookup_num_tokens": 3}}


def make(model, **more):
    return RecallCache.for_model(model, **PLAN, **more)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bits", [8, 4, (4, 2)])
def test_modes_of_generate_give_the_same_tokens_in_tiers(mode, bits):
    model, tokens = tiny_llama(layers=2), random_tokens(300)
    caches = make(model, bits=bits), make(model, bits=bits, offloading=True)
    ours, tiered = (greedy(model, tokens, **MODES[mode], past_key_values=cache) for cache in caches)
    assert torch.equal(ours, tiered)
    assert caches[0].n_seen == 323
    assert all(layer.cache.caches[0].n_clustered for layer in caches[0].own_layers)


def test_a_prompt_attends_to_all_tokens_as_they_are_read_back():
    """Several new tokens at once, after a body is there; with 8 bits the logits are nearer to stock's than with 2."""
    model, tokens = tiny_llama(layers=2), random_tokens(260)
    full, caches = DynamicCache(), {bits: make(model, bits=bits) for bits in (16, 8, 2)}
    with torch.no_grad():
        for each in (full, *caches.values()):
            model(tokens[:, :250], past_key_values=each)
        right = model(tokens[:, 250:], past_key_values=full).logits
        errors = {
            bits: float((model(tokens[:, 250:], past_key_values=cache).logits - right).abs().max())
            for bits, cache in caches.items()
        }
    assert errors[16] < errors[8] < errors[2]


@pytest.mark.parametrize("bits", [4, (8, 2)])
@pytest.mark.parametrize("offloading", [False, True])
def test_files_hold_what_is_quantized(bits, offloading, tmp_path):
    model, tokens = tiny_llama(layers=2), random_tokens(220)
    cache = make(model, bits=bits, offloading=offloading)
    with torch.no_grad():
        model(tokens[:, :219], past_key_values=cache)
    cache.save(tmp_path / "cache.safetensors")
    loaded = RecallCache.load(tmp_path / "cache.safetensors", model)
    with torch.no_grad():
        ours, theirs = (model(tokens[:, 219:], past_key_values=each).logits for each in (loaded, cache))
    assert torch.equal(ours, theirs)
    assert loaded.nbytes == cache.nbytes


def test_the_report_says_bits_and_bytes_and_dense_layers_have_none():
    model = tiny_llama(layers=3).to(torch.bfloat16)
    cache = make(model, bits=4, n_dense_layers=1)
    with torch.no_grad():
        model(random_tokens(400), past_key_values=cache)
    dense, *recalled = cache.report().layers
    assert dense.bits is None
    assert dense.bytes_ratio == 1
    for layer in recalled:
        assert layer.bits == [4, 4]
        # 16 features with one scale take 20 bytes in place of 32: a group is 32 at least; beside them the index
        assert layer.bytes_ratio < 1


@pytest.mark.parametrize("bits", [5, "4", None, True])
def test_bits_that_cannot_be_served_are_refused(bits):
    with pytest.raises((TypeError, ValueError), match="bits must be"):
        make(tiny_llama(), bits=bits)
