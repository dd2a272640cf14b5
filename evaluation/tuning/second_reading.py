"""How much each token of a context is attended to while the model reads the context a second time.

With the full cache of a context in place, the model is told to repeat it and then given its own tokens. A token's score
in a KV head is the highest attention weight that any query of this second reading gives it, so it is high wherever the
head ever looks back at it. The idea and the words are KVzip's (arXiv:2505.23416), as notes on its code have them; the
softmax over the keys of the context alone and everything in `whole_heads` are our choice.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from kvcluster.fast.huggingface.hooks import attention_modules, check_model

from ..layers import full_layers
from ..texts import encode

__all__ = ["pieces_to_repeat", "second_reading"]

NAME = "kvcluster-observed"
REPEAT = "\n\nRepeat the previous context exactly."
REPEAT_PART = "\n\nRepeat the part of the previous context exactly, starting with"
N_PIECE = 1024  # tokens of the context in a piece
N_BEFORE = 8  # tokens that a later piece starts after
LOGITS_AT_ONCE = 2**20  # few enough for the processor's caches


def pieces_to_repeat(tokenizer: Any, context: list[int], *, n_piece: int = N_PIECE) -> list[list[int]]:
    """What the model is given to read again: the context in pieces, each after what it is told to do.

    Parameters
    ----------
    context : tokens.
    n_piece : the most tokens of the context in a piece.
    """
    pieces = []
    for start in range(0, len(context), n_piece):
        told = encode(tokenizer, REPEAT_PART if start else REPEAT) + context[max(0, start - N_BEFORE) : start]
        pieces.append(told + context[start : start + n_piece])
    return pieces


@torch.inference_mode()
def second_reading(
    model: Any, context: list[int], pieces: list[list[int]], *, on_piece: Callable[[], object] = lambda: None
) -> dict[int, Float[Tensor, "kv_heads tokens"]]:
    """The highest attention weight of each token of `context` while the model reads `pieces` behind it.

    Parameters
    ----------
    model : a transformers model of a type that our caches serve, with `sdpa` attention.
    context : tokens.
    pieces : tokens that are read behind the context, each as if there were no other; see `pieces_to_repeat`.
    on_piece : called when the context has been read, and after each piece.

    Returns
    -------
    scores : of every layer that attends to everything, by its index: the maximum over all queries of all pieces and
        over the query heads of the group; float32, in [0, 1].

    Raises
    ------
    ValueError : another type of model or of attention; a model whose layers all slide; an empty context, or a piece
        that goes beyond the model's positions.

    Notes
    -----
    Weights are softmax over the keys of the context alone: what a query gives to its own piece, itself for the most
    part, does not count. The model computes what it always does, by `sdpa`; its modules run our function meanwhile, and
    have their own config again afterwards, whatever happens. The cache of the context is copied for each piece, so
    nothing is stored, and windows that slide have forgotten nothing.
    Costs the prefill of the context, and of the pieces behind it, and as many dot products again.
    """
    config = check_model(model, attention=("sdpa",))
    layers, kv_heads = full_layers(model)
    if not context:
        raise ValueError("context must have at least one token, got none")
    n_positions = config.max_position_embeddings
    if len(context) + max(map(len, pieces)) > n_positions:
        raise ValueError(
            f"tokens must leave room for {max(map(len, pieces)):,} more within the model's {n_positions:,} positions, "
            f"got {len(context):,}"
        )
    base, device = model.base_model, model.device  # without its head: nobody asks for logits
    full = DynamicCache(config=config)
    base(torch.tensor([context], device=device), past_key_values=full)
    on_piece()
    shape = (kv_heads, len(context))
    scores = {index: torch.zeros(shape, dtype=torch.float32, device=device) for index in layers}
    with observed(model, scores):
        for piece in pieces:
            base(torch.tensor([piece], device=device), past_key_values=copy.deepcopy(full))
            on_piece()
    return scores


@contextmanager
def observed(model: Any, scores: dict[int, Tensor]) -> Iterator[None]:
    """Let the layers of `scores` raise them at each call of the model.

    As with `ModelHooks`, modules get a copy of their config that names our function: the model's own config still says
    `sdpa`, and its masks are made for that.
    """
    modules = [module for module in attention_modules(model) if module.layer_idx in scores]
    configs, handles = [module.config for module in modules], []
    try:
        for module in modules:
            module.config = copy.copy(module.config)
            module.config._attn_implementation = NAME
            handles.append(module.register_forward_pre_hook(with_scores(scores[module.layer_idx]), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module, config in zip(modules, configs, strict=True):
            module.config = config


def with_scores(scores: Tensor) -> Callable[..., tuple[Any, dict[str, Any]]]:
    """A pre-hook of an attention module that gives its function the scores to raise."""

    def before_attention(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "observed_scores": scores}

    return before_attention


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """The output of transformers' own `sdpa` function, after raising the scores of the layer."""
    raise_to_weights(kwargs.pop("observed_scores"), query, key, scale=kwargs["scaling"])
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def raise_to_weights(scores: Tensor, query: Tensor, key: Tensor, *, scale: float) -> None:
    """Raise `scores` (kv_heads, n_context), in place, to the first `n_context` keys' weights where these are higher.

    `query` is (1, heads, queries, dim), `key` (1, kv_heads, tokens, dim). All context keys come before all queries, so
    there is nothing to mask.
    """
    kv_heads, n_context = scores.shape
    queries = query[0].reshape(kv_heads, -1, query.shape[-1]).float()  # (kv_heads, group * queries, dim)
    keys = key[0, :, :n_context].float().transpose(1, 2)  # (kv_heads, dim, n_context)
    n_rows = max(1, LOGITS_AT_ONCE // scores.numel())
    for rows in queries.split(n_rows, dim=1):
        weights = torch.softmax(rows @ keys * scale, dim=-1)  # (kv_heads, rows, n_context)
        torch.maximum(scores, weights.amax(dim=1), out=scores)


AttentionInterface.register(NAME, attend)
