"""What differs between transformers 4.57 and 5.23 in what is asked of a cache's layer, and nothing else."""

from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

__all__ = ["AnyVersionLayer", "forget_window"]


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


def forget_window(layer: Any) -> None:
    """Drop what a sliding layer of transformers holds. Older versions reset it to zeros, which count as tokens."""
    layer.keys = layer.values = None
    layer.is_initialized = False
