"""What transformers asks of the cache of a model and of its layers, as far as all of ours answer alike."""

from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from .hooks import ModelHooks
from .plot import plot_cache
from .report import CacheReport, report_cache

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["EntryLayer", "ModelCache"]


class ModelCache(Cache):
    """The key-value cache of a whole model; subclasses make it by `for_model`.

    Every layer holds a cache of `kvcluster.fast` (batch, kv_heads, entries, dim) as `layers[i].entries`.
    """

    is_kvcluster = True

    def __init__(self, layers: list[Any], hooks: ModelHooks) -> None:
        super().__init__(layers=layers)
        self._hooks = hooks

    @property
    def n_seen(self) -> int:
        """Tokens appended so far."""
        return self.layers[0].entries.n_seen

    @property
    def n_stored(self) -> int:
        """Entries held per layer and KV head."""
        return self.layers[0].entries.n_stored

    @property
    def nbytes(self) -> int:
        """Bytes of the stored entries of all layers."""
        return sum(layer.entries.nbytes for layer in self.layers)

    def report(self) -> CacheReport:
        """What every layer holds and has cost: a table for rich, `as_dict()` for JSON."""
        return report_cache(self)

    def plot(self, row: int = 0) -> "Figure":
        """Cluster sizes along the sequence, every layer and KV head of one batch row, as a matplotlib figure."""
        return plot_cache(self, row)

    @property
    def nbytes_reserved(self) -> int:
        """Bytes of memory that all layers hold, room to grow included."""
        return sum(layer.entries.nbytes_reserved for layer in self.layers)


class EntryLayer(CacheLayerMixin):
    """One layer: new tokens are taken by `update`, attended to, and clustered by `finish`, which a hook calls."""

    is_sliding = False
    entries: Any

    def __init__(self) -> None:
        self.is_announced = False  # by the hooks, before each call of its attention module
        self.reset()

    @property
    def keys(self) -> Tensor | None:
        return self.entries.keys

    @property
    def values(self) -> Tensor | None:
        return self.entries.values

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take the new tokens, exact as yet; return the keys and values that they attend to."""
        if not self.is_announced:
            raise RuntimeError(
                "attention would miss what the cache knows: use it with the model that it was made for by for_model"
            )
        self.is_announced = False
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.entries.extend(key_states, value_states)
        return self.held()

    def held(self) -> tuple[Tensor, Tensor]:
        """Keys and values that new tokens attend to, themselves last."""
        return self.entries.keys, self.entries.values

    def by_kv_head(self, query: Tensor) -> Tensor:
        """`query` (batch, heads, queries, dim) as rows of each KV head, (batch, kv_heads, group * queries, dim)."""
        batch, _, _, dim = query.shape
        return query.reshape(batch, self.held()[0].shape[1], -1, dim)

    def attends(self, queries: int) -> bool:
        """Whether `attend` does the work for `queries` new tokens, rather than transformers."""
        raise NotImplementedError

    def attend(self, query: Tensor, *, scale: float) -> Tensor:
        """Output (batch, heads, queries, dim) of the last `queries` tokens, each attending to entries up to its own."""
        raise NotImplementedError

    def finish(self) -> None:
        """Cluster what is due, now that the new tokens have been attended to."""
        self.entries.cluster()

    def get_seq_length(self) -> int:
        return self.entries.n_seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns of the mask, and the position that its first must claim for the new tokens' columns to be right."""
        return self.entries.n_stored + query_length, self.entries.n_seen - self.entries.n_stored

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> NoReturn:
        raise NotImplementedError(
            "crop: tokens that were clustered cannot be taken out again (assisted decoding needs it)"
        )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self.batch_select_indices(torch.arange(len(self.held()[0])).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.is_initialized:
            self.entries.select(indices.to(self.device))
