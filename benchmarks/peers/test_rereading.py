"""That hiding tokens by a mask gives what kvpress gives; `make bench-peers` runs it first."""

import pytest
import torch
from agreement import equal_in_float32
from models import tiny_llama
from transformers import DynamicCache

from benchmarks.peers.rereading import REREADING, Hidden, hidden_from_questions, read_again

N_TOKENS, RATIO = 700, 0.75


class Spelling:
    """As much of a tokenizer as presses use."""

    def encode(self, text, **_):
        return torch.tensor([[ord(letter) % 97 for letter in text]])


def drawn(n, seed):
    return torch.randint(97, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("name", REREADING)
def test_what_is_kept_is_a_quarter_and_the_rest_is_not_seen(name):
    model = tiny_llama(heads=6)
    hidden = read_again(model, Spelling(), REREADING[name](RATIO), drawn(N_TOKENS, 1))
    kept = sum(hidden.n_kept) / len(hidden.n_kept)
    assert 0.23 * N_TOKENS < kept <= 0.2501 * N_TOKENS
    assert hidden.cache.get_seq_length() == N_TOKENS
    question = torch.tensor([drawn(9, 3)])
    if hidden.tokens is None:
        return
    with hidden_from_questions(model, hidden), torch.no_grad():
        ours = model(question, past_key_values=hidden.cache).logits
    hidden.cache.crop(N_TOKENS)
    for layer, mask in zip(hidden.cache.layers, hidden.tokens, strict=True):  # values that nobody reads
        layer.values = layer.values.masked_fill(mask[None, ..., None], 1e4)
    with hidden_from_questions(model, hidden), torch.no_grad():
        assert torch.equal(model(question, past_key_values=hidden.cache).logits, ours)


@pytest.mark.parametrize("name", ["KVzip", "KVgrad"])
def test_masks_do_what_kvpress_does_with_keys(name):
    """Its keys have weights of 0 in float32: both add up the same numbers, in another order. It finds none for many."""
    model, tokens, question = tiny_llama(heads=6), drawn(N_TOKENS, 1), torch.tensor([drawn(1, 3)])
    hidden = read_again(model, Spelling(), REREADING[name](RATIO), tokens)
    modules = [block.self_attn for block in model.model.layers]
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.tensor([tokens]), past_key_values=cache)
        for module, mask in zip(modules, hidden.tokens, strict=True):
            heads, places = mask.nonzero(as_tuple=True)
            module.masked_key_indices = torch.zeros_like(heads), heads, places
        theirs = model(question, past_key_values=cache).logits
        for module in modules:
            module.masked_key_indices = None
        with hidden_from_questions(model, hidden):
            ours = model(question, past_key_values=hidden.cache).logits
        hidden.cache.crop(N_TOKENS)
        seen = Hidden(hidden.cache, [torch.zeros_like(mask) for mask in hidden.tokens])
        with hidden_from_questions(model, seen):
            of_all = model(question, past_key_values=hidden.cache).logits
    assert equal_in_float32(ours.numpy(), theirs.numpy())
    assert not equal_in_float32(of_all.numpy(), theirs.numpy())
