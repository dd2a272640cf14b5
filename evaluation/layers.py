"""Which layers of a model clustering is about: those that attend to all tokens, not to a sliding window."""

from typing import Any

from transformers import DynamicCache

__all__ = ["full_layers"]


def full_layers(model: Any) -> tuple[list[int], int]:
    """The layers of `model` that attend to all tokens, by their index, ascending, and the KV heads of each.

    As transformers' own cache has it, so that they are the layers that our caches make their own.

    Raises
    ------
    ValueError : there is no such layer.
    """
    layers = [index for index, layer in enumerate(DynamicCache(config=model.config).layers) if not layer.is_sliding]
    if not layers:
        raise ValueError("model must have a layer that attends to everything, got one whose layers all slide")
    return layers, int(model.config.num_key_value_heads)
