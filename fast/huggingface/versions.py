"""What differs between transformers 4.57 and 5.23 in what is asked of a cache's layer, and nothing else."""

import inspect
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from ..scalars import check_integer

__all__ = ["AnyVersionLayer", "forget_window", "tokens_to_crop", "window_croppable"]

CROPS_TO_LENGTH = "max_length" in inspect.signature(Cache.crop).parameters


class AnyVersionLayer(CacheLayerMixin):
    """A layer that answers every supported version; subclasses have `mask_sizes` and `get_max_length`."""

    def get_mask_sizes(self, new_tokens: Any) -> tuple[int, int]:
        """Before 5.4 `new_tokens` are their positions, a tensor; from 5.4 on their number."""
        return self.mask_sizes(len(new_tokens) if isinstance(new_tokens, torch.Tensor) else new_tokens)

    def mask_sizes(self, queries: int) -> tuple[int, int]:
        raise NotImplementedError

    def get_max_cache_shape(self) -> int:
        """The older name of `get_max_length`."""
        return self.get_max_length()

    def get_max_length(self) -> int:
        raise NotImplementedError


def tokens_to_crop(asked: int, n_seen: int) -> int:
    """How many tokens `crop(asked)` of a cache that has seen `n_seen` removes.

    A number that is not negative is the length to be left in older versions; newer ones only allow 0, for nothing.
    """
    asked = check_integer("tokens_to_remove", asked)
    if asked < 0:
        return -asked
    if CROPS_TO_LENGTH:
        return max(0, n_seen - asked)
    if asked > 0:
        raise ValueError(f"tokens_to_remove must be 0 or negative, minus the tokens to remove, got {asked}")
    return 0


def forget_window(layer: Any) -> None:
    """Drop what a sliding layer of transformers holds. Older versions reset it to zeros, which count as tokens."""
    layer.keys = layer.values = None
    layer.is_initialized = False


def window_croppable(layer: Any) -> int:
    """The most tokens that a sliding layer of transformers can give up: none once older ones have left its window.

    Where it has been told to keep those (from 5.4 on), as many as leave a whole window.
    """
    n_seen: int = layer.get_seq_length()
    if n_seen < layer.sliding_window:
        return n_seen
    return max(0, layer.keys.shape[-2] - layer.sliding_window + 1) if getattr(layer, "record_past", False) else 0
