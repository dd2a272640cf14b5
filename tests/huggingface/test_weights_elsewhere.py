"""Models whose weights lie elsewhere, or are no parameters; calls under autocast."""

import copy

import pytest
import torch
from accelerate import cpu_offload
from models import random_tokens, tiny_llama

from kvcluster.fast import SoftMatching
from kvcluster.fast.huggingface import ClusteredCache, RecallCache

SIZES = {"chunk_size": 16, "n_sink": 3, "n_recent": 40}


def offloaded(model):
    """`model`, a copy, whose layers fetch their weights when they are called."""
    return cpu_offload(copy.deepcopy(model), execution_device="cpu")


def quantized(model):
    """`model`, a copy, whose matrices are int8 and no parameters."""
    return torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {torch.nn.Linear}, dtype=torch.qint8)


def filled(model):
    cache = ClusteredCache.for_model(model, keep_ratio=0.4, **SIZES)
    with torch.no_grad():
        return cache, model(random_tokens(120), past_key_values=cache).logits


def loads(path, model):
    """Whether it does; what it refuses must be the model."""
    try:
        ClusteredCache.load(path, model)
    except ValueError as error:
        if "of the model that path was saved with must be that of model" not in str(error):
            raise
        return False
    return True


def test_a_model_that_fetches_its_weights_is_the_model_that_has_them(tmp_path):
    model, path = tiny_llama(), tmp_path / "cache.safetensors"
    there = offloaded(model)
    assert next(there.model.layers[0].parameters()).is_meta
    (ours, expected), (theirs, logits) = filled(model), filled(there)
    assert torch.equal(logits, expected)
    for cache in (ours, theirs):
        cache.save(path)
        assert [loads(path, each) for each in (model, there)] == [True, True]
        assert [loads(path, each(tiny_llama(seed=1))) for each in (copy.deepcopy, offloaded)] == [False, False]
    assert ClusteredCache.load(path, there).layers[0].keys.device.type == "cpu"


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_model_of_quantized_layers_is_told_from_others(tmp_path):
    model, path = tiny_llama(), tmp_path / "cache.safetensors"
    in_bits = quantized(model)
    assert not list(in_bits.model.layers[0].self_attn.parameters())
    cache, _ = filled(in_bits)
    cache.save(path)
    others = model, quantized(tiny_llama(seed=1))
    assert [loads(path, each) for each in (in_bits, quantized(model), *others)] == [True, True, False, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "make",
    [
        lambda model: ClusteredCache.for_model(model, keep_ratio=0.4, **SIZES),
        lambda model: ClusteredCache.for_model(model, budget=90, method=SoftMatching(), **SIZES),
        lambda model: ClusteredCache.for_model(model, keep_ratio=0.4, bits=4, **SIZES),
        lambda model: RecallCache.for_model(model, budget=60, n_sink=3, segment_size=20),
    ],
    ids=["ratio", "budget", "bits", "recall"],
)
def test_a_prompt_under_autocast_goes_on_under_autocast_only(dtype, make):
    model, tokens = tiny_llama(), random_tokens(120)
    cache = make(model)
    with torch.no_grad():
        with torch.autocast("cpu", dtype=dtype):
            model(tokens, past_key_values=cache)
        name = str(dtype).removeprefix("torch.")
        with pytest.raises(ValueError, match=f"must have the dtype of the cache, {name}, got float32"):
            model(tokens[:, :5], past_key_values=cache)
        with torch.autocast("cpu", dtype=dtype):
            logits = model(tokens[:, :5], past_key_values=cache).logits
    assert cache.n_seen == 125
    assert logits.isfinite().all()
