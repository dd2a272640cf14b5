"""The caches that a press makes of a context for every ratio, without reading the context again.

kvpress compresses each layer in a hook after its attention, which is given the layer's input, its keys and its values.
All of these are kept from one reading, so that the same function of the press gets the same arguments. So they are of a
context with a question behind it, where only the question is read anew. Layers with a sliding window are left as they
are, as kvpress leaves Gemma 3's.
`test_compressing.py` compares the caches, and the arguments, with those of kvpress itself.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer
from transformers.models.llama.modeling_llama import repeat_kv, rotate_half

__all__ = ["Context", "PressedLayer", "Prompt", "compress", "read_context", "read_question", "side_by_side"]

Rotary = tuple[Tensor, Tensor]  # cosines and sines of all positions


@dataclass(frozen=True)
class Context:
    """A context after its one reading.

    Attributes
    ----------
    cache : transformers' own, of all tokens.
    inputs : of the attention of each layer, (1, tokens, features).
    rotary : of all tokens, in layers that attend to everything.
    logits : after the last token, (vocabulary).
    """

    cache: DynamicCache
    inputs: list[Tensor]
    rotary: Rotary
    logits: Tensor

    @property
    def n_tokens(self) -> int:
        return self.inputs[0].shape[1]

    def layer(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs, keys and values of all tokens. Keys and values are clones, since a press may write into them."""
        stored = self.cache.layers[index]
        return self.inputs[index], stored.keys.clone(), stored.values.clone()


@dataclass(frozen=True)
class Prompt:
    """A context with a question behind it, of which only what the question adds is held; see `Context`.

    Attributes
    ----------
    inputs, keys, values : of each layer, of the tokens of the question.
    rotary : of all tokens.
    logits : after the last token of the question, (vocabulary).
    """

    context: Context
    inputs: list[Tensor]
    keys: list[Tensor]
    values: list[Tensor]
    rotary: Rotary
    logits: Tensor

    @property
    def n_tokens(self) -> int:
        return self.context.n_tokens + self.inputs[0].shape[1]

    def layer(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs, keys and values of all tokens, all new."""
        stored = self.context.cache.layers[index]
        return (
            torch.cat([self.context.inputs[index], self.inputs[index]], dim=1),
            torch.cat([stored.keys, self.keys[index]], dim=2),
            torch.cat([stored.values, self.values[index]], dim=2),
        )

    def full(self) -> Cache:
        """A cache of all tokens."""
        layers = [self.layer(index)[1:] for index in range(len(self.inputs))]
        return Cache(layers=[PressedLayer(keys, values, self.n_tokens) for keys, values in layers])


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

    def get_mask_sizes(self, new: Tensor | int) -> tuple[int, int]:
        """Of the new tokens kvpress's transformers gives the positions; from 5.4 on it is their number."""
        return self.keys.shape[-2] + (new if isinstance(new, int) else len(new)), self.n_dropped


@torch.inference_mode()
def read_context(model: Any, tokens: list[int]) -> Context:
    """Read `tokens` in one call, and keep what presses need."""
    cache = DynamicCache(config=model.config)
    return Context(cache, *watched(model, cache, tokens))


@torch.inference_mode()
def read_question(model: Any, context: Context, question: list[int]) -> Prompt:
    """Read a question behind a context, exactly; the context is left as it is."""
    cache = copy.deepcopy(context.cache)
    inputs, rotary, logits = watched(model, cache, question)
    keys, values = (
        [getattr(layer, name)[:, :, context.n_tokens :].clone() for layer in cache.layers]
        for name in ("keys", "values")
    )
    cos, sin = (torch.cat(parts, dim=1) for parts in zip(context.rotary, rotary, strict=True))
    return Prompt(context, inputs, keys, values, (cos, sin), logits)


def watched(model: Any, cache: Any, tokens: list[int]) -> tuple[list[Tensor], Rotary, Tensor]:
    """Let the model read `tokens`: the inputs of each attention, cosines and sines, and the logits after the last."""
    inputs: list[Tensor] = []
    rotary: list[Rotary] = []

    def before(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        inputs.append(kwargs["hidden_states"])
        if not is_sliding(module):
            rotary.append(kwargs["position_embeddings"])

    handles = [layer.self_attn.register_forward_pre_hook(before, with_kwargs=True) for layer in model.model.layers]
    try:
        logits = model(torch.tensor([tokens]), past_key_values=cache, logits_to_keep=1).logits
    finally:
        for handle in handles:
            handle.remove()
    return inputs, rotary[0], logits[0, -1]


@torch.inference_mode()
def compress(model: Any, presses: list[Any], context: Context | Prompt, *, needs_weights: bool = False) -> list[Cache]:
    """A cache for each of `presses`; weights of attention are computed once per layer for all of them."""
    layers: list[list[DynamicLayer]] = [[] for _ in presses]
    kwargs = {"position_embeddings": context.rotary}
    with prepared(model, presses):
        for index, block in enumerate(model.model.layers):
            module, weights = block.self_attn, None
            if is_sliding(module):
                for of_press in layers:
                    of_press.append(copy.deepcopy(context.cache.layers[index]))
                continue
            for of_press, press in zip(layers, presses, strict=True):
                hidden, keys, values = context.layer(index)
                if needs_weights and weights is None:
                    weights = attention_weights(module, hidden, keys, context.rotary)
                keys, values = press.compress(module, hidden, keys, values, weights, kwargs)
                of_press.append(PressedLayer(keys, values, context.n_tokens))
    return [Cache(layers=of_press) for of_press in layers]


def side_by_side(caches: list[Cache]) -> Cache:
    """The caches of several prompts as rows of one.

    Raises
    ------
    ValueError : prompts of different lengths, whose next tokens stand at different positions.
    """
    lengths = sorted({cache.get_seq_length() for cache in caches})
    if len(lengths) != 1:
        raise ValueError(f"caches must be of prompts of one length, got {', '.join(map(str, lengths))} tokens")
    layers = []
    for rows in zip(*(cache.layers for cache in caches), strict=True):
        keys, values = (torch.cat([getattr(row, name) for row in rows]) for name in ("keys", "values"))
        layers.append(PressedLayer(keys, values, lengths[0]))
    return Cache(layers=layers)


def is_sliding(module: Any) -> bool:
    """Whether attention has a window, and its layer is not compressed."""
    return bool(getattr(module, "is_sliding", False))


@contextmanager
def prepared(model: Any, presses: list[Any]) -> Iterator[None]:
    """What kvpress does to a model before it runs."""
    for press in presses:
        press.post_init_from_model(model)
    rotary = model.model.rotary_emb
    if any(is_sliding(block.self_attn) for block in model.model.layers):
        rotary = partial(rotary, layer_type="full_attention")  # Gemma 3 has two
    for block in model.model.layers:
        block.self_attn.rotary_emb = rotary
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
