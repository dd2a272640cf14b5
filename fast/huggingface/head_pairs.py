"""Whole heads of a whole model, as pairs of layer and KV head, checked and sorted by layer."""

from collections.abc import Sequence
from typing import Any

from ..scalars import check_integer

__all__ = ["HeadPairs", "heads_of_layers"]

HeadPairs = Sequence[tuple[int, int]]


def heads_of_layers(model: Any, whole_heads: HeadPairs) -> list[tuple[int, ...]]:
    """The KV heads of each layer of `model` that keep every token, ascending.

    Raises
    ------
    TypeError, ValueError : no pairs of integers; a layer or a KV head that the model does not have, or a layer that
        attends to a sliding window, whose heads cannot keep every token; a pair given twice; a model whose heads are
        spread over several devices.
    """
    config = model.config
    n_layers, kv_heads = config.num_hidden_layers, config.num_key_value_heads
    types = getattr(config, "layer_types", None) or [""] * n_layers
    heads: list[list[int]] = [[] for _ in range(n_layers)]
    for pair in whole_heads:
        if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
            raise TypeError(f"whole_heads must be pairs of a layer and a KV head, got {pair!r}")
        layer, head = (check_integer("whole_heads", number, least=0) for number in pair)
        if layer >= n_layers or head >= kv_heads:
            raise ValueError(
                f"whole_heads must be of {n_layers} layers and {kv_heads} KV heads, counted from 0, got {(layer, head)}"
            )
        if types[layer] == "sliding_attention":
            raise ValueError(f"whole_heads must be of layers that attend to all tokens, got {(layer, head)}")
        if head in heads[layer]:
            raise ValueError(f"whole_heads must be different pairs, got {(layer, head)} twice")
        heads[layer].append(head)
    if any(heads) and is_sharded(model):
        raise ValueError(f"whole_heads must be empty for a model whose KV heads are sharded, got {list(whole_heads)}")
    return [tuple(sorted(of_layer)) for of_layer in heads]


def is_sharded(model: Any) -> bool:
    """Whether each process has but some of the KV heads."""
    return (getattr(model, "_tp_size", None) or 1) > 1
