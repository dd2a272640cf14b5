"""That compressing after the reading gives what kvpress gives, on one short context; `make peers` runs it first."""

import pytest
import torch
from compressing import PressedLayer, compress, read_context
from presses import PRESSES
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

RATIO = 0.75


def make_model(attention="sdpa"):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=96,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        attn_implementation=attention,
    )
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("name", PRESSES)
@torch.inference_mode()
def test_caches_are_those_of_kvpress(name):
    model = make_model("eager" if PRESSES[name].needs_weights else "sdpa")
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
        if PRESSES[name].needs_weights:  # computed here in another order of operations: the same up to rounding
            assert torch.isclose(a.values.sort(2).values, b.values.sort(2).values, atol=1e-5).float().mean() > 0.99
        else:
            assert torch.equal(a.keys, b.keys)
            assert torch.equal(a.values, b.values)
    question = torch.randint(97, (1, 9), generator=torch.Generator().manual_seed(3))
    expected = model(question, past_key_values=theirs, position_ids=torch.arange(700, 709)[None]).logits
    assert torch.allclose(model(question, past_key_values=ours).logits, expected, atol=1e-4)
