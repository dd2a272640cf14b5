"""That compressing after the reading gives what kvpress gives, bit for bit; `make bench-peers` runs it first.

What kvpress-free tests say of a question behind a context is in tests/evaluation/test_peers_question_first.py.
"""

import pytest
import torch
from agreement import equal_in_float32
from families import tiny
from models import tiny_llama
from transformers import DynamicCache

from benchmarks.peers.compressing import (
    PressedLayer,
    attention_weights,
    compress,
    prepared,
    read_context,
    read_question,
)
from benchmarks.peers.presses import COMPARED, PRESSES
from kvcluster.evaluation.quality.scoring import copy_rows

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


@pytest.mark.parametrize("name", COMPARED)
@torch.inference_mode()
def test_layers_with_a_window_are_left_as_they_are(name):
    """As kvpress does with Gemma 3: its hooks are on the other layers, which have a rotary embedding of their own."""
    model, sliding = tiny("gemma3_text")
    tokens = torch.randint(model.config.vocab_size, (1, 700), generator=torch.Generator().manual_seed(6))
    theirs, press = DynamicCache(config=model.config), PRESSES[name].make(RATIO)
    with prepared(model, [press]):
        torch.manual_seed(2)
        hooked = [block.self_attn for index, block in enumerate(model.model.layers) if index not in sliding]
        handles = [module.register_forward_hook(press.forward_hook, with_kwargs=True) for module in hooked]
        model(tokens, past_key_values=theirs)
        for handle in handles:
            handle.remove()
    context = read_context(model, tokens[0].tolist())
    torch.manual_seed(2)
    [ours] = compress(model, [PRESSES[name].make(RATIO)], context)
    for index, (a, b) in enumerate(zip(ours.layers, theirs.layers, strict=True)):
        assert isinstance(a, PressedLayer) == (index not in sliding)
        assert torch.equal(a.keys, b.keys)
        assert torch.equal(a.values, b.values)
    question = torch.randint(model.config.vocab_size, (1, 9), generator=torch.Generator().manual_seed(3))
    rows = copy_rows(ours, 2)
    logits = model(question, past_key_values=ours).logits
    of_rows = model(question.repeat(2, 1), past_key_values=rows).logits
    assert equal_in_float32(of_rows[1].numpy(), logits[0].numpy())
    exact = model(question, past_key_values=context.cache).logits
    assert ours.get_seq_length() == context.cache.get_seq_length() == 709
    assert not equal_in_float32(logits.numpy(), exact.numpy())  # the wrong twin: nothing compressed


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
