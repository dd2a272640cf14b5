"""That compressing after the reading gives what kvpress gives, bit for bit; `make bench-peers` runs it first."""

import pytest
import torch
from models import tiny_llama
from transformers import DynamicCache

from benchmarks.peers.compressing import PressedLayer, attention_weights, compress, read_context
from benchmarks.peers.presses import PRESSES

RATIO = 0.75


@pytest.mark.parametrize("name", PRESSES)
@torch.inference_mode()
def test_caches_are_those_of_kvpress(name):
    model = tiny_llama(heads=6, attention="eager" if PRESSES[name].needs_weights else "sdpa")
    tokens = torch.randint(97, (1, 700), generator=torch.Generator().manual_seed(1))
    theirs = DynamicCache(config=model.config)
    torch.manual_seed(2)
    with PRESSES[name].make(RATIO)(model):
        model(tokens, past_key_values=theirs)
    torch.manual_seed(2)
    context = read_context(model, tokens[0].tolist())
    [ours] = compress(model, [PRESSES[name].make(RATIO)], context, needs_weights=PRESSES[name].needs_weights)
    for a, b in zip(ours.layers, theirs.layers, strict=True):
        assert isinstance(a, PressedLayer)
        assert a.keys.shape == b.keys.shape
        assert 0.2 * 700 < a.keys.shape[-2] <= 0.25 * 700
        assert torch.equal(a.keys, b.keys)
        assert torch.equal(a.values, b.values)
    question = torch.randint(97, (1, 9), generator=torch.Generator().manual_seed(3))
    expected = model(question, past_key_values=theirs, position_ids=torch.arange(700, 709)[None]).logits
    assert torch.equal(model(question, past_key_values=ours).logits, expected)


@torch.inference_mode()
def test_weights_of_attention_are_those_of_transformers():
    model = tiny_llama(heads=6, attention="eager")
    tokens = torch.randint(97, (1, 150), generator=torch.Generator().manual_seed(4))
    context = read_context(model, tokens[0].tolist())
    expected = model(tokens, output_attentions=True).attentions
    stored = [layer.keys for layer in context.cache.layers]
    for block, hidden, keys, right in zip(model.model.layers, context.inputs, stored, expected, strict=True):
        assert torch.equal(attention_weights(block.self_attn, hidden, keys, context.rotary), right)
        assert not torch.equal(attention_weights(block.self_attn, hidden, keys.flip(1), context.rotary), right)
