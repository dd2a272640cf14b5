"""Presses that read the context again before they compress it, as kvpress runs them: KVzip, KVzip+, KVgrad, KVCompose.

kvpress frees nothing for those that keep other tokens in each head: it makes the keys of all others useless to the
questions that come. Here the same tokens are hidden by a mask instead, which holds for any number of questions; quality
is that of a cache which holds the rest only. `test_rereading.py` compares both.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from kvpress import KVComposePress, KVgradPress, KVzipPress
from kvpress.presses import kvzip_press
from torch import Tensor
from transformers import AttentionInterface, DynamicCache
from transformers.cache_utils import Cache
from transformers.models.llama.modeling_llama import repeat_kv

from benchmarks.peers.compressing import PressedLayer

__all__ = ["REREADING", "Hidden", "hidden_from_questions", "read_again"]

NAME = "kvcluster_hidden"
REREADING = {
    "KVzip": lambda ratio: KVzipPress(ratio),
    "KVzip (layers alike)": lambda ratio: KVzipPress(ratio, layerwise=True),
    "KVzip+": lambda ratio: KVzipPress(ratio, kvzip_plus_normalization=True),
    "KVgrad": lambda ratio: KVgradPress(ratio),
    "KVCompose": lambda ratio: KVComposePress(compression_ratio=ratio),
    "KVCompose (heads apart)": lambda ratio: KVComposePress(compression_ratio=ratio, structured=False),
}


@dataclass(frozen=True)
class Hidden:
    """A cache and the tokens of it that no question sees.

    Attributes
    ----------
    cache : all tokens, or where nothing is hidden what the press has left.
    tokens : for each layer (kv_heads, tokens), bool; None where nothing is hidden.
    """

    cache: Any
    tokens: list[Tensor] | None

    @property
    def n_kept(self) -> list[float]:
        """Entries of each layer that are seen, on average over its KV heads."""
        if self.tokens is None:
            return [float(layer.keys.shape[-2]) for layer in self.cache.layers]
        return [(~hidden).sum().item() / hidden.shape[0] for hidden in self.tokens]


def read_again(model: Any, tokenizer: Any, press: Any, tokens: list[int]) -> Hidden:
    """Let `press` read and compress `tokens`, a plain text: no template of a conversation is put around it."""
    cache, modules = DynamicCache(config=model.config), [block.self_attn for block in model.model.layers]
    plain = mock.Mock(chat_template=None, encode=tokenizer.encode)
    with mock.patch.object(kvzip_press, "AutoTokenizer") as loads, torch.no_grad():
        loads.from_pretrained.return_value = plain
        with press(model):
            model(input_ids=torch.tensor([tokens]), past_key_values=cache, logits_to_keep=1)
    hidden = [mask_of(module, len(tokens)) for module in modules]
    for module in modules:
        module.masked_key_indices = None
    if any(mask is None for mask in hidden):
        layers = [PressedLayer(layer.keys, layer.values, len(tokens)) for layer in cache.layers]
        return Hidden(Cache(layers=layers), None)
    cache.crop(len(tokens))
    return Hidden(cache, [mask for mask in hidden if mask is not None])


def mask_of(module: Any, n_tokens: int) -> Tensor | None:
    """What kvpress hides of a layer, (kv_heads, tokens); None: nothing."""
    indices = getattr(module, "masked_key_indices", None)
    if indices is None:
        return None
    _, heads, places = indices
    mask = torch.zeros(module.config.num_key_value_heads, n_tokens, dtype=torch.bool)
    mask[heads, places] = True
    return mask


@contextmanager
def hidden_from_questions(model: Any, hidden: Hidden) -> Iterator[None]:
    """Let the model attend to what is not hidden."""
    if hidden.tokens is None:
        yield
        return
    before = model.config._attn_implementation
    for block, mask in zip(model.model.layers, hidden.tokens, strict=True):
        block.self_attn.hidden_tokens = mask
    model.config._attn_implementation = NAME
    try:
        yield
    finally:
        model.config._attn_implementation = before
        for block in model.model.layers:
            del block.self_attn.hidden_tokens


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention of the last tokens to those that are not hidden, and to one another."""
    groups, n, n_keys = module.num_key_value_groups, query.shape[2], key.shape[2]
    sees = torch.ones(n, n_keys, dtype=torch.bool).tril(n_keys - n).repeat(module.hidden_tokens.shape[0], 1, 1)
    sees[..., : module.hidden_tokens.shape[1]] &= ~module.hidden_tokens[:, None]
    of_heads = sees.repeat_interleave(groups, dim=0)[None]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    output = torch.nn.functional.scaled_dot_product_attention(query, key, value, of_heads, scale=kwargs["scaling"])
    return output.transpose(1, 2), None


AttentionInterface.register(NAME, attend)
