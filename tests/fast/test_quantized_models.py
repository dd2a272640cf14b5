"""Codes, scales and zeros of what real models store: the same bits in NumPy, torch and C++."""

import numpy as np
import pytest
import torch
from agreement import assert_same_bits
from inputs import to_numpy
from transformers import DynamicCache

from kvcluster import fast, reference
from kvcluster.evaluation.models import load_model
from kvcluster.evaluation.texts import built_in_text, encode
from kvcluster.fast.backends import cell
from kvcluster.fast.exact.blocks import BlockLayout
from kvcluster.fast.huggingface.hooks import MODEL_TYPES

N_TOKENS = 1024


@pytest.fixture(scope="module")
def layers(real_model):
    """Keys and values (1, kv_heads, tokens, dim) of all layers, float32, after one reading of reference text."""
    model, tokenizer = load_model(real_model, MODEL_TYPES)
    cache = DynamicCache()  # without the model's config, so that sliding layers keep all tokens too
    with torch.inference_mode():
        model(torch.tensor([encode(tokenizer, built_in_text())[:N_TOKENS]]), past_key_values=cache)
    return [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_codes_scales_and_zeros_are_those_of_the_reference(layers, bits):
    for dtype in (torch.float32, torch.bfloat16):
        for keys, values in layers:
            for array in (keys.mT, values):
                array = array.to(dtype).contiguous()
                ours = fast.quantize(array, bits=bits)
                theirs = reference.quantize(to_numpy(array), bits=bits)
                assert_same_bits(ours.codes, theirs.codes)
                assert_same_bits(ours.scales.float(), theirs.scales)
                assert_same_bits(ours.zeros, theirs.zeros)
                assert torch.equal(cell("pack_rows", "cpp")(array, bits), cell("pack_rows", "torch")(array, bits))
            assert not torch.equal(
                fast.quantize(values.flip(-1), bits=bits).codes, fast.quantize(values, bits=bits).codes
            )
            layout = BlockLayout(keys.shape[-1], values.shape[-1], (bits, bits))
            blocks = keys.to(dtype), values.to(dtype), torch.ones(keys.shape[:-1], dtype=torch.int32), layout
            assert torch.equal(cell("pack_blocks", "cpp")(*blocks), cell("pack_blocks", "torch")(*blocks))


def test_a_cache_in_few_bits_holds_the_bytes_of_the_reference(layers):
    """The first, a middle and the last layer, with recent tokens in few bits and heads with shares of their own."""
    plan = {"chunk_size": 128, "n_sink": 4, "n_recent": 124, "n_exact": 32, "bits": (4, 3)}
    for keys, values in (layers[0], layers[len(layers) // 2], layers[-1]):
        plan["keep_ratios"] = tuple(0.2 + 0.3 * head for head in range(keys.shape[1]))
        ours, theirs = fast.RaggedCache(**plan), reference.RaggedCache(**plan)
        ours.append(keys, values)
        theirs.append(keys.numpy(), values.numpy())
        for array, expected in zip(ours.entries(), theirs.entries(), strict=True):
            assert_same_bits(array, np.ascontiguousarray(expected))
