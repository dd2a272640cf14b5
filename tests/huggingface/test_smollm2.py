"""The real SmolLM2-135M: every decision of every layer, and the NumPy Llama on its weights."""

import itertools

import numpy as np
import pytest
import torch
from agreement import assert_same_bits, logits_agree

from kvcluster import fast, reference
from kvcluster.evaluation.models import load_model
from kvcluster.evaluation.texts import load_tokens
from kvcluster.fast import SoftMatching
from kvcluster.fast.huggingface import ClusteredCache
from kvcluster.reference.llama import Llama

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("smollm2")]

N_TOKENS = 4096
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def smollm2():
    return load_model(None)


@pytest.fixture(scope="module")
def full(smollm2):
    """The full cache of 4,096 tokens of the Python language reference."""
    model, tokenizer = smollm2
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    with torch.inference_mode():
        cache = model(load_tokens(None, tokenizer, N_TOKENS), use_cache=True, logits_to_keep=1).past_key_values
    torch.set_num_threads(threads)
    return cache


@pytest.mark.parametrize("keep_ratio", [0.5, 0.25, 0.2])
def test_no_assignment_differs_in_any_layer(full, keep_ratio):
    compared = 0
    for layer in full.layers:
        keys = layer.keys[0]
        expected = reference.chunked_soft_matching(keys.numpy(), keep_ratio=keep_ratio)
        ours = fast.chunked_soft_matching(keys, keep_ratio=keep_ratio)
        assert_same_bits(ours.labels, expected.labels)
        assert_same_bits(ours.counts, expected.counts)
        assert_same_bits(fast.merge(keys, ours), reference.merge(keys.numpy(), expected))
        compared += expected.labels.size
    assert compared == 30 * 3 * N_TOKENS


@pytest.mark.parametrize("layer", [0, 15, 29])
def test_kernels_agree_on_real_keys(full, layer, few_programs, record_property):
    keys = full.layers[layer].keys[0]
    expected = reference.chunked_soft_matching(keys.numpy(), keep_ratio=0.25, chunk_size=64)
    made = SoftMatching().compress(keys.to(DEVICE), None, chunk_size=64, target=16, backend="triton")
    first = 16 * torch.arange(N_TOKENS // 64)[:, None]
    labels = (made.labels.cpu().reshape(3, -1, 64) + first).reshape(3, N_TOKENS)
    assert_same_bits(labels, expected.labels)
    centroids = reference.merge(keys.numpy(), expected)
    assert_same_bits(made.keys.cpu().reshape(centroids.shape), centroids)
    record_property("rows", made.n_rows)


def test_the_published_cache_holds_the_same_bytes_as_the_tokens_arrive(full):
    keys, values = full.layers[15].keys[0], full.layers[15].values[0]
    plan = {"ratio": 0.25, "max_new_tokens": 80, "n_prompt": 4000, "whole_heads": (1,)}
    held = []
    for pieces in ([4000, *[1] * 96], [*[500] * 8, *[1] * 96]):
        caches = reference.ChelseaCache(**plan), fast.ChelseaCache(**plan), fast.ChelseaCache(**plan, backend="torch")
        starts = np.cumsum([0, *pieces])
        for start, end in itertools.pairwise(starts):
            caches[0].append(keys[:, start:end].numpy(), values[:, start:end].numpy())
            for cache in caches[1:]:
                cache.append(keys[:, start:end], values[:, start:end])
        for name in ("keys", "values", "counts", "whole_keys", "whole_values"):
            for cache in caches[1:]:
                assert_same_bits(getattr(cache, name), getattr(caches[0], name))
        held.append(caches[0].keys.tobytes())
    assert held[0] != held[1]


def test_a_quarter_is_kept_in_less_than_three_tenths_of_the_bytes(smollm2, full):
    model, _ = smollm2
    cache = ClusteredCache.for_model(model, keep_ratio=0.25, chunk_size=64, n_recent=64, method=SoftMatching())
    for index, layer in enumerate(full.layers):
        cache.layers[index].cache.caches[0].append(layer.keys, layer.values)
    full_bytes = sum(x.untyped_storage().nbytes() for layer in full.layers for x in (layer.keys, layer.values))
    assert full_bytes == 30 * 3 * N_TOKENS * 2 * 64 * 4
    assert cache.nbytes <= 0.30 * full_bytes


def test_numpy_llama_gives_transformers_logits_on_real_weights(smollm2):
    model, tokenizer = smollm2
    tokens = load_tokens(None, tokenizer, 64)
    llama = Llama({name: weight.numpy() for name, weight in model.state_dict().items()}, model.config.to_dict())
    logits = llama.forward(tokens[0].tolist(), llama.full_caches())
    with torch.inference_mode():
        baseline = model(tokens).logits[0].numpy()
        oracle = model.double()(tokens).logits[0].numpy()
        model.float()
    assert logits_agree(logits, baseline, oracle)
    assert not logits_agree(np.roll(logits, 1, axis=0), baseline, oracle)
