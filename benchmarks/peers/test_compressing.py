"""That compressing after the reading gives what kvpress gives, bit for bit; `make bench-peers` runs it first.

What kvpress-free tests say of a question behind a context is in tests/evaluation/test_peers_question_first.py.
"""

import pytest
import torch
from agreement import equal_in_float32
from models import tiny_llama
from transformers import DynamicCache

from benchmarks.peers.compressing import PressedLayer, attention_weights, compress, read_context, read_question
from benchmarks.peers.presses import COMPARED, PRESSES

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


def watch(press):
    """All that the press is given from now on, layer by layer."""
    seen, inner = [], press.compress

    def compress_and_note(module, hidden, keys, values, weights, kwargs):
        tensors = [hidden, keys, values, *([] if weights is None else [weights])]
        seen.append((module, [x.clone() for x in tensors], kwargs["position_embeddings"]))
        return inner(module, hidden, keys, values, weights, kwargs)

    press.compress = compress_and_note
    return seen


@pytest.mark.parametrize("name", PRESSES)
@torch.inference_mode()
def test_a_press_is_given_what_kvpress_gives_it_with_the_question_in_the_prompt(name):
    model = tiny_llama(heads=6, attention="eager" if PRESSES[name].needs_weights else "sdpa")
    tokens = torch.randint(97, (1, 700), generator=torch.Generator().manual_seed(5))
    theirs, press = DynamicCache(config=model.config), PRESSES[name].make(RATIO)
    expected = watch(press)
    with press(model):
        model(tokens, past_key_values=theirs)
    for end, is_same in (([], True), ([3], False)):  # the second with another last token
        press = PRESSES[name].make(RATIO)
        seen = watch(press)
        question = [*tokens[0, 690 : 700 - len(end)].tolist(), *end]
        prompt = read_question(model, read_context(model, tokens[0, :690].tolist()), question)
        [ours] = compress(model, [press], prompt, needs_weights=PRESSES[name].needs_weights)
        assert [layer.keys.shape for layer in ours.layers] == [layer.keys.shape for layer in theirs.layers]
        assert len(seen) == len(expected) == model.config.num_hidden_layers
        for (module, tensors, rotary), (right, right_tensors, right_rotary) in zip(seen, expected, strict=True):
            assert module is right
            assert all(map(torch.equal, rotary, right_rotary))
            pairs = zip(tensors, right_tensors, strict=True)
            assert all(equal_in_float32(a.numpy(), b.numpy()) for a, b in pairs) == is_same


def test_presses_that_are_compared_are_there():
    assert set(COMPARED) <= set(PRESSES)
