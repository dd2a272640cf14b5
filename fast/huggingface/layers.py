"""What transformers asks of a layer of a cache, as far as all of ours answer alike."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from ..scalars import check_integer
from .attention import without_gradients
from .compiling import uncompiled
from .row_groups import RowGroups
from .versions import AnyVersionLayer

__all__ = ["EntryLayer", "check_dense_layers", "layers_of_model"]


def check_dense_layers(n_dense_layers: int, n_layers: int) -> int:
    """`n_dense_layers`; refuse what is not a number of layers that the model has."""
    number = check_integer("n_dense_layers", n_dense_layers)
    if not 0 <= number <= n_layers:
        raise ValueError(f"n_dense_layers must be from 0 to the layers of model, {n_layers}, got {number}")
    return number


def layers_of_model(config: Any, make: Callable[[int], "EntryLayer"]) -> list[Any]:
    """A layer for each of the model's: transformers' own where attention slides, ours made from its index elsewhere."""
    stock = DynamicCache(config=config).layers
    return [layer if layer.is_sliding else make(index) for index, layer in enumerate(stock)]


class EntryLayer(AnyVersionLayer):
    """One layer: new tokens are taken by `update`, attended to, and clustered by `finish`, which a hook calls."""

    is_sliding = False
    is_croppable = True
    cache: RowGroups
    make: Callable[[], Any]  # an empty cache of `kvcluster.fast`

    def __init__(self) -> None:
        self.is_announced = False  # by the hooks, before each call of its attention module
        self.has_own_attention = False  # in this call; else log counts are in the mask
        self.is_attended = False  # by our attention function, in this call
        self.padding: Sequence[int] | None = None  # of each row, if there is any, this call's included; from the hooks
        self.is_first = True  # whether the tokens of the last call were the first ones
        self.reset()

    @property
    def keys(self) -> Tensor | None:
        return self.cache.keys

    @property
    def values(self) -> Tensor | None:
        return self.cache.values

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device, self.kv_heads = key_states.dtype, key_states.device, key_states.shape[1]
        self.is_initialized = True

    @uncompiled
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take the new tokens, exact as yet; return the keys and values that they attend to."""
        if not self.is_announced:
            raise RuntimeError(
                "attention would miss what the cache knows: use it with the model that it was made for by for_model"
            )
        self.is_announced = False
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.is_first = self.cache.n_seen == 0
        width = self.cache.width + key_states.shape[2]
        self.cache.extend(key_states, value_states, self.padding)
        if self.is_first or (self.has_own_attention and self.attends(key_states.shape[2])):
            return key_states, value_states  # own attention does not use them
        if self.cache.is_padded:
            held = self.side_by_side(width, "keys"), self.side_by_side(width, "values")
        else:
            held = self.held()
        return without_gradients(held[0], key_states), without_gradients(held[1], value_states)

    def side_by_side(self, width: int, name: str) -> Tensor:
        """Keys or values of all rows of a batch with padding, (batch, kv_heads, width, dim), the last entries last."""
        return self.cache.side_by_side(width, name)

    def held(self) -> tuple[Tensor, Tensor]:
        """Keys and values that new tokens attend to, themselves last."""
        keys, values = self.cache.keys, self.cache.values
        assert keys is not None  # the new tokens are there
        assert values is not None
        return keys, values

    def by_kv_head(self, query: Tensor) -> Tensor:
        """`query` (batch, heads, queries, dim) as rows of each KV head, (batch, kv_heads, group * queries, dim)."""
        batch, _, _, dim = query.shape
        return query.reshape(batch, self.kv_heads, -1, dim)

    def attends(self, queries: int) -> bool:
        """Whether `attend` does the work for `queries` new tokens, rather than transformers."""
        raise NotImplementedError

    def attend(self, query: Tensor, *, scale: float) -> Tensor:
        """Output (batch, heads, queries, dim) of the last `queries` tokens, each attending to entries up to its own."""
        return self.cache.spread(query, lambda cache, rows: self.attend_to(cache, rows, scale))

    def attend_to(self, cache: Any, query: Tensor, scale: float) -> Tensor:
        """As `attend`, of rows without padding to their cache."""
        raise NotImplementedError

    def observe(self, query: Tensor) -> None:
        """See the queries (batch, heads, queries, dim) of the new tokens, after `update`; most caches need none."""

    def finish(self) -> None:
        """Cluster what is due, now that the new tokens have been attended to."""
        self.cache.cluster()

    def get_seq_length(self) -> int:
        return self.cache.n_seen

    def mask_sizes(self, queries: int) -> tuple[int, int]:
        """Columns of the mask, and the position that its first must claim for the new tokens' columns to be right."""
        return self.cache.width + queries, self.cache.n_seen - self.cache.width

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.cache = RowGroups(self.make)
        self.is_initialized = False

    def crop(self, n_tokens: int) -> None:
        """Remove the last `n_tokens` tokens."""
        self.cache.crop(n_tokens)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self.batch_select_indices(torch.arange(self.cache.n_rows, device=self.device).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.is_initialized:
            self.cache.select(indices.to(self.device) if isinstance(indices, Tensor) else indices)
