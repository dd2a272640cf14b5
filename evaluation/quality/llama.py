"""A Llama of transformers, layer by layer, with attention by the caller; benchmarks score with it."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from .scoring import prefill

__all__ = ["Attend", "forward", "logits_of", "read_layers"]

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
# Output (batch, heads, tokens, dim) of a layer from its number, its query (batch, heads, tokens, dim), and its new keys
# and values (batch, kv_heads, tokens, dim), where query and keys have their positions applied.


def read_layers(
    model: Any, tokens: list[int]
) -> list[tuple[Float[Tensor, "kv_heads tokens dim"], Float[Tensor, "kv_heads tokens dim"]]]:
    """Keys and values of all layers after one forward pass over a context."""
    return [(layer.keys[0], layer.values[0]) for layer in prefill(model, lambda model: None, tokens).layers]


@torch.inference_mode()
def forward(
    model: Any, tokens: Int64[Tensor, "batch tokens"], positions: Int64[Tensor, "rows tokens"], attend: Attend
) -> Float[Tensor, "batch tokens features"]:
    """Hidden states after all layers; `positions` have one row for the whole batch, or one for each of its rows."""
    hidden = model.model.embed_tokens(tokens)
    cos, sin = model.model.rotary_emb(hidden, positions)
    for number, layer in enumerate(model.model.layers):
        module, normed = layer.self_attn, layer.input_layernorm(hidden)
        query, keys, values = (
            project(normed).view(*tokens.shape, -1, module.head_dim).transpose(1, 2)
            for project in (module.q_proj, module.k_proj, module.v_proj)
        )  # (batch, heads or kv_heads, tokens, dim)
        query, keys = apply_rotary_pos_emb(query, keys, cos, sin)
        output = attend(number, query, keys, values)
        hidden = hidden + module.o_proj(output.transpose(1, 2).reshape(*tokens.shape, -1))
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return hidden


@torch.inference_mode()
def logits_of(model: Any, hidden: Float[Tensor, "... features"]) -> Float[Tensor, "... vocabulary"]:
    """What hidden states after all layers predict."""
    logits: Tensor = model.lm_head(model.model.norm(hidden))
    return logits
