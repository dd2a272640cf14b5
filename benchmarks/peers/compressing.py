"""The caches that a press makes of a context for every ratio, without reading the context again.

kvpress compresses each layer in a hook after its attention, which is given the layer's input, its keys and its values.
All of these are kept from one reading, so that the same function of the press gets the same arguments.
`test_compressing.py` compares the caches with those that kvpress itself makes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer
from transformers.models.llama.modeling_llama import repeat_kv, rotate_half

__all__ = ["Context", "PressedLayer", "compress", "read_context"]


@dataclass(frozen=True)
class Context:
    """A context after its one reading.

    Attributes
    ----------
    cache : transformers' own, of all tokens.
    inputs : of the attention of each layer, (1, tokens, features).
    rotary : cosines and sines of all positions.
    """

    cache: DynamicCache
    inputs: list[Tensor]
    rotary: tuple[Tensor, Tensor]

    @property
    def n_tokens(self) -> int:
        return self.inputs[0].shape[1]


class PressedLayer(DynamicLayer):
    """Entries that a press left of `n_seen` tokens; later tokens stand at the positions after these.

    transformers takes positions from the number of entries; kvpress's pipeline corrects that by passing positions.
    """

    def __init__(self, keys: Tensor, values: Tensor, n_seen: int) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values
        self.n_dropped = n_seen - keys.shape[-2]

    def get_seq_length(self) -> int:
        return self.keys.shape[-2] + self.n_dropped

    def get_mask_sizes(self, cache_position: Tensor) -> tuple[int, int]:
        return self.keys.shape[-2] + len(cache_position), self.n_dropped


@torch.inference_mode()
def read_context(model: Any, tokens: list[int]) -> Context:
    """Read `tokens` in one call, and keep what presses need."""
    cache = DynamicCache(config=model.config)
    inputs: list[Tensor] = []
    rotary: list[tuple[Tensor, Tensor]] = []

    def before(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        inputs.append(kwargs["hidden_states"])
        rotary.append(kwargs["position_embeddings"])

    handles = [layer.self_attn.register_forward_pre_hook(before, with_kwargs=True) for layer in model.model.layers]
    try:
        model(torch.tensor([tokens]), past_key_values=cache, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    return Context(cache, inputs, rotary[0])


@torch.inference_mode()
def compress(model: Any, presses: list[Any], context: Context, *, needs_weights: bool = False) -> list[Cache]:
    """A cache for each of `presses`; weights of attention are computed once per layer for all of them."""
    layers: list[list[PressedLayer]] = [[] for _ in presses]
    kwargs = {"position_embeddings": context.rotary}
    with prepared(model, presses):
        for block, hidden, stored in zip(model.model.layers, context.inputs, context.cache.layers, strict=True):
            module = block.self_attn
            weights = attention_weights(module, hidden, stored.keys, context.rotary) if needs_weights else None
            for of_press, press in zip(layers, presses, strict=True):
                # a clone, since a press may write into what it gets
                keys, values = press.compress(
                    module, hidden, stored.keys.clone(), stored.values.clone(), weights, kwargs
                )
                of_press.append(PressedLayer(keys, values, context.n_tokens))
    return [Cache(layers=of_press) for of_press in layers]


@contextmanager
def prepared(model: Any, presses: list[Any]) -> Iterator[None]:
    """What kvpress does to a model before it runs."""
    for press in presses:
        press.post_init_from_model(model)
    for block in model.model.layers:
        block.self_attn.rotary_emb = model.model.rotary_emb
    try:
        yield
    finally:
        for block in model.model.layers:
            del block.self_attn.rotary_emb


def attention_weights(module: Any, hidden: Tensor, keys: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """As transformers' eager attention gives them, (1, heads, tokens, tokens)."""
    cos, sin = (x.unsqueeze(1) for x in rotary)
    queries = module.q_proj(hidden).view(1, hidden.shape[1], -1, module.head_dim).transpose(1, 2)
    queries = queries * cos + rotate_half(queries) * sin
    logits = queries @ repeat_kv(keys, module.num_key_value_groups).transpose(2, 3) * module.scaling
    logits.masked_fill_(torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1), float("-inf"))
    return logits.softmax(dim=-1)
