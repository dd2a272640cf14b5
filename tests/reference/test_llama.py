"""The NumPy Llama against transformers' own."""

import numpy as np
import pytest
import torch
from agreement import logits_agree
from models import greedy, random_tokens, tiny_llama

from kvcluster import reference
from kvcluster.reference.llama import FullCache, Llama, LlamaConfig
from kvcluster.reference.rotary import rope_frequencies

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
VARIANTS = {
    "group 1, head 16": {"heads": 4, "kv_heads": 4},
    "group 3, head 64": {"heads": 6, "kv_heads": 2, "head_dim": 64},
    "group 4, head 80": {"heads": 4, "kv_heads": 1, "head_dim": 80},
    "tied": {"tied": True},
    "linear rope": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0}},
    "llama3 rope": {"rope_parameters": LLAMA3},
    "theta 100,000": {"rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0}},
}


def in_numpy(model):
    return Llama({name: weight.numpy() for name, weight in model.state_dict().items()}, model.config.to_dict())


def transformers_logits(model, tokens):
    """In float32 (the baseline) and float64 (the oracle); the model is left in float32."""
    with torch.inference_mode():
        baseline = model(tokens).logits[0].numpy()
        oracle = model.double()(tokens).logits[0].numpy()
    model.float()
    return baseline, oracle


@pytest.mark.parametrize("variant", VARIANTS)
def test_numpy_llama_gives_transformers_logits(variant):
    model = tiny_llama(**VARIANTS[variant])
    tokens = random_tokens(200)
    llama = in_numpy(model)
    baseline, oracle = transformers_logits(model, tokens)
    assert logits_agree(llama.forward(tokens[0].tolist(), llama.full_caches()), baseline, oracle)


@pytest.mark.parametrize("twin", ["rope_theta", "rms_norm_eps", "rope_type"])
def test_wrong_twins_of_the_llama_are_told_apart(twin):
    model = tiny_llama(heads=4, kv_heads=4, rope_parameters=LLAMA3)
    tokens = random_tokens(200)
    config = model.config.to_dict()
    wrong = {
        "rope_theta": {"rope_parameters": LLAMA3 | {"rope_theta": 505_000.0}},
        "rms_norm_eps": {"rms_norm_eps": 1e-5},
        "rope_type": {"rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0}},
    }[twin]
    weights = {name: weight.numpy() for name, weight in model.state_dict().items()}
    llama = Llama(weights, config | wrong)
    baseline, oracle = transformers_logits(model, tokens)
    assert not logits_agree(llama.forward(tokens[0].tolist(), llama.full_caches()), baseline, oracle)


def test_numpy_llama_generates_transformers_tokens():
    model = tiny_llama()
    tokens = random_tokens(50)
    llama = in_numpy(model)
    assert llama.generate(tokens[0].tolist(), 24, llama.full_caches()) == greedy(model, tokens)[0].tolist()


def test_full_and_unclustered_caches_are_the_same():
    llama = in_numpy(tiny_llama())
    tokens = random_tokens(60)[0].tolist()
    caches = llama.full_caches()
    logits = llama.forward(tokens, caches)
    kept = [reference.ClusteredCache(keep_ratio=1, chunk_size=8, n_recent=8) for _ in range(3)]
    assert np.array_equal(llama.forward(tokens, kept), logits)
    assert np.array_equal(llama.forward([1, 2], kept), llama.forward([1, 2], caches))
    assert all(cache.n_seen == 62 for cache in [*caches, *kept])


def test_a_prompt_at_once_is_attended_to_exactly_and_clustered_after():
    llama = in_numpy(tiny_llama())
    tokens = random_tokens(60)[0].tolist()
    clustered = [reference.ClusteredCache(keep_ratio=0.25, chunk_size=8, n_recent=8) for _ in range(3)]
    full = llama.full_caches()
    assert np.array_equal(llama.forward(tokens, clustered), llama.forward(tokens, full))
    assert clustered[0].n_stored < 60
    assert not np.array_equal(llama.forward([1], clustered), llama.forward([1], full))


def test_configs_old_and_new_are_read():
    new = LlamaConfig.from_dict(tiny_llama(rope_parameters=LLAMA3).config.to_dict())
    scaling = {name: value for name, value in LLAMA3.items() if name != "rope_theta"}
    old = LlamaConfig.from_dict(
        {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
        | {"rope_theta": 500_000.0, "rope_scaling": scaling, "rms_norm_eps": 1e-6}
    )
    assert np.array_equal(new.rope_frequencies(), old.rope_frequencies())
    assert (new.head_dim, new.num_key_value_heads) == (old.head_dim, old.num_key_value_heads)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type must be 'llama', got 'gpt2'"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu', got 'gelu'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1.0, got 0.5"),
        ({"attention_bias": True}, "attention_bias must be False, got True"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type must be 'default', 'linear' or 'llama3', got 'yarn'"),
    ],
)
def test_unsupported_configs_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        LlamaConfig.from_dict(tiny_llama().config.to_dict() | change)


def test_old_checkpoints_carry_frequencies_that_are_ignored():
    model = tiny_llama()
    weights = {name: weight.numpy() for name, weight in model.state_dict().items()}
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, dtype=np.float32)
    Llama(weights, model.config.to_dict())


def test_weights_of_another_model_are_refused():
    model = tiny_llama()
    weights = {name: weight.numpy() for name, weight in model.state_dict().items()}
    weights["model.layers.0.self_attn.q_proj.bias"] = weights.pop("model.norm.weight")
    with pytest.raises(ValueError, match=r"missing \['model.norm.weight'\], unknown \['model.layers.0.self_attn.q"):
        Llama(weights, model.config.to_dict())


def test_no_tokens_are_refused():
    llama = in_numpy(tiny_llama())
    with pytest.raises(ValueError, match="number of tokens must be at least 1, got 0"):
        llama.forward([], llama.full_caches())


def test_other_tokens_and_caches_than_the_models_are_refused():
    llama = in_numpy(tiny_llama())
    with pytest.raises(ValueError, match="tokens must be from 0 to 96, got -1 to 3"):
        llama.forward([3, -1], llama.full_caches())
    with pytest.raises(ValueError, match="caches must be one a layer, 3, got 1"):
        llama.forward([3], llama.full_caches()[:1])


def test_frequencies_of_the_default_rope_by_hand():
    assert np.array_equal(rope_frequencies(4, theta=100.0), np.array([1.0, 0.1], dtype=np.float32))
    assert FullCache().n_seen == 0
