"""What transformers asks of the cache of a model and of its layers, as far as all of ours answer alike."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Self

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache

from .hooks import ModelHooks
from .plot import plot_cache
from .report import CacheReport, report_cache
from .saving import load_cache, save_cache
from .versions import AnyVersionLayer, forget_window

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["EntryLayer", "ModelCache", "layers_of_model"]


class ModelCache(Cache):
    """The key-value cache of a whole model; subclasses make it by `for_model`.

    Every layer holds a cache of `kvcluster.fast` (batch, kv_heads, entries, dim) as `layers[i].entries`, but for those
    that attend to a sliding window, which are transformers' own.
    """

    is_kvcluster = True

    def __init__(self, layers: list[Any], hooks: ModelHooks, parameters: dict[str, Any]) -> None:
        super().__init__(layers=layers)
        self._hooks, self.parameters = hooks, parameters

    def save(self, path: str | Path) -> None:
        """Write the cache to the safetensors file `path`, the whole of it or nothing; see `load`.

        Raises
        ------
        FileNotFoundError : no such folder.
        RuntimeError : a call of the model failed halfway, or the model that the cache was made for is gone.
        """
        save_cache(self, self._hooks.model(), path)

    @classmethod
    def load(cls, path: str | Path, model: nn.Module) -> Self:
        """The cache that `save` wrote to `path`, on the device of `model`: it continues as the one that was saved.

        Raises
        ------
        FileNotFoundError : no such file.
        ValueError : a file of another model, class or format, or one that is not whole; the first difference is named.

        Notes
        -----
        Models are told apart by their config and by a sample of the weights: those that differ in their feed-forward
        layers or in layers between the first and the last only are taken for one.
        """
        return load_cache(cls, path, model, {})

    @property
    def own_layers(self) -> list["EntryLayer"]:
        """The layers that are ours, not transformers'."""
        return [layer for layer in self.layers if not layer.is_sliding]

    @property
    def n_seen(self) -> int:
        """Tokens appended so far."""
        return self.get_seq_length()

    @property
    def n_stored(self) -> int:
        """Entries held per KV head by each layer of ours; 0 for a model whose layers all slide."""
        return self.own_layers[0].entries.n_stored if self.own_layers else 0

    @property
    def nbytes(self) -> int:
        """Bytes of what all layers store."""
        return sum(layer.entries.nbytes for layer in self.own_layers) + sum(x.nbytes for x in self.windows)

    @property
    def windows(self) -> list[Tensor]:
        """Keys and values of the sliding layers."""
        return [x for layer in self.layers if layer.is_sliding for x in (layer.keys, layer.values) if x is not None]

    def report(self) -> CacheReport:
        """What every layer holds and has cost: a table for rich, `as_dict()` for JSON."""
        return report_cache(self)

    def plot(self, row: int = 0) -> "Figure":
        """Cluster sizes along the sequence, every layer and KV head of one batch row, as a matplotlib figure."""
        return plot_cache(self, row)

    @property
    def nbytes_reserved(self) -> int:
        """Bytes of memory that all layers hold, room to grow included."""
        of_windows = sum(x.untyped_storage().nbytes() for x in self.windows)
        return sum(layer.entries.nbytes_reserved for layer in self.own_layers) + of_windows

    def reset(self) -> None:
        """Empty all layers."""
        for layer in self.layers:
            if layer.is_sliding:
                forget_window(layer)
            layer.reset()

    def crop(self, tokens_to_remove: int) -> NoReturn:
        raise NotImplementedError(
            "crop: tokens that were clustered cannot be taken out again (assisted decoding needs it)"
        )


def layers_of_model(config: Any, make: Callable[[int], "EntryLayer"]) -> list[Any]:
    """A layer for each of the model's: transformers' own where attention slides, ours made from its index elsewhere."""
    stock = DynamicCache(config=config).layers
    return [layer if layer.is_sliding else make(index) for index, layer in enumerate(stock)]


class EntryLayer(AnyVersionLayer):
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
        self.dtype, self.device, self.kv_heads = key_states.dtype, key_states.device, key_states.shape[1]
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
        return query.reshape(batch, self.kv_heads, -1, dim)

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

    def mask_sizes(self, queries: int) -> tuple[int, int]:
        """Columns of the mask, and the position that its first must claim for the new tokens' columns to be right."""
        return self.entries.n_stored + queries, self.entries.n_seen - self.entries.n_stored

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self.batch_select_indices(torch.arange(len(self.held()[0])).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.is_initialized:
            self.entries.select(indices.to(self.device))
