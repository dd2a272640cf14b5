"""Decoding with candidates: several tokens are tried at once, and those that were rejected are taken out again."""

import pytest
import torch
from models import random_tokens, tiny_llama

from kvcluster.fast import SoftMatching
from kvcluster.fast.huggingface import ChelseaCache, ClusteredCache, RecallCache

CLUSTERED = {"keep_ratio": 0.25, "chunk_size": 16, "n_sink": 2, "n_recent": 8, "method": SoftMatching()}
RECALL = {"budget": 40, "n_sink": 2, "n_recent": 2, "tokens_per_cluster": 4, "prompt_segment_size": 16}
CHELSEA = {"max_new_tokens": 40, "interval": 3, "chunk_size": 16, "n_sink": 2, "n_recent": 8}
HEADS = [(0, 1), (2, 0)]  # whole ones
RAGGED = [[0.3, 0.9], 0.25, [1.0, 0.25]]
WHOLE = {
    "clustered": lambda model: ClusteredCache.for_model(model, **CLUSTERED | {"keep_ratio": 1}),
    "budget": lambda model: ClusteredCache.for_model(model, **CLUSTERED | {"keep_ratio": 1, "budget": 300}),
    "chelsea": lambda model: ChelseaCache.for_model(model, ratio=1, whole_heads=HEADS, **CHELSEA),
    "ragged": lambda model: ClusteredCache.for_model(model, **CLUSTERED | {"keep_ratio": [[1.0, 1.0], 1.0, 1.0]}),
    "recall": lambda model: RecallCache.for_model(model, **RECALL | {"budget": 400}),
}
FORGETFUL = {
    "clustered": lambda model: ClusteredCache.for_model(model, **CLUSTERED),
    "budget": lambda model: ClusteredCache.for_model(model, **CLUSTERED | {"keep_ratio": 1, "budget": 60}),
    "heads": lambda model: ClusteredCache.for_model(model, whole_heads=HEADS, **CLUSTERED),
    "chelsea": lambda model: ChelseaCache.for_model(model, ratio=0.25, whole_heads=HEADS, **CHELSEA),
    "ragged": lambda model: ClusteredCache.for_model(model, **CLUSTERED | {"keep_ratio": RAGGED}),
    "recall": lambda model: RecallCache.for_model(model, **RECALL),
    "offloaded": lambda model: RecallCache.for_model(model, **RECALL, offloading=True),
}
N_NEW = 40


def modes(model):
    """Arguments of generate: an assistant that is nearly always right, one that never is, and the prompt itself."""
    alike, other = tiny_llama(), tiny_llama(seed=1)
    alike.model.layers[-1].mlp.down_proj.weight.data *= 0.9
    return {
        "right": {"assistant_model": alike},
        "wrong": {"assistant_model": other},
        "prompt": {"prompt_lookup_num_tokens": 6},
    }


def generate(model, tokens, **kwargs):
    settings = {"max_new_tokens": N_NEW, "do_sample": False, "pad_token_id": 0, "eos_token_id": 1000}  # never comes
    return model.generate(tokens, attention_mask=torch.ones_like(tokens), **settings, **kwargs)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["right", "wrong", "prompt"])
@pytest.mark.parametrize(
    ("name", "attention"), [*((name, "sdpa") for name in WHOLE), ("clustered", "eager"), ("budget", "eager")]
)
def test_a_cache_that_forgets_nothing_gives_the_tokens_of_stock_generate(name, mode, attention):
    model = tiny_llama(attention=attention)
    tokens = random_tokens(20).repeat(1, 6)  # something to look up
    cache = WHOLE[name](model)
    stock = generate(model, tokens)
    assert torch.equal(generate(model, tokens, past_key_values=cache, **modes(model)[mode]), stock)
    assert 120 + N_NEW - 2 <= cache.n_seen <= 120 + N_NEW


@pytest.mark.parametrize("mode", ["right", "wrong", "prompt"])
@pytest.mark.parametrize("name", FORGETFUL)
def test_rejected_candidates_leave_nothing_behind(name, mode):
    """The cache has seen the tokens that were generated, no others; what it holds of them, test_operations tells."""
    model = tiny_llama()
    tokens = random_tokens(20).repeat(1, 6)
    cache = FORGETFUL[name](model)
    made = generate(model, tokens, past_key_values=cache, **modes(model)[mode])
    assert made.shape[1] >= 120 + N_NEW  # 4.57 lets candidates go beyond the end
    assert made.shape[1] - 2 <= cache.n_seen <= made.shape[1]


@pytest.mark.parametrize("name", FORGETFUL)
def test_what_cannot_be_cropped_is_refused_and_nothing_is_lost(name):
    """A prompt of many clustered chunks, then one more token: that one can go, the prompt cannot."""
    model = tiny_llama()
    cache = FORGETFUL[name](model)
    with torch.inference_mode():
        model(random_tokens(120), past_key_values=cache)
        model(random_tokens(1), past_key_values=cache)
    most = cache.n_croppable
    assert 1 <= most < 121
    with pytest.raises(ValueError, match=f"crop must remove at most the {most} tokens .* got {most + 1}"):
        cache.crop(-most - 1)
    assert cache.n_seen == 121
    cache.crop(-1)
    assert cache.n_seen == 120


def test_crop_without_a_sign_means_what_transformers_means_by_it():
    import inspect

    from transformers import Cache

    model = tiny_llama()
    cache = WHOLE["clustered"](model)
    with torch.inference_mode():
        model(random_tokens(120), past_key_values=cache)
    if "max_length" in inspect.signature(Cache.crop).parameters:
        cache.crop(118)
        assert cache.n_seen == 118
        cache.crop(500)
        assert cache.n_seen == 118
    else:
        with pytest.raises(ValueError, match=r"tokens_to_remove must be 0 or negative, .* got 118"):
            cache.crop(118)
        cache.crop(0)
        assert cache.n_seen == 120
