"""What transformers asks of the cache of a model and of its layers, as far as all of ours answer alike."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache

from .compiling import uncompiled
from .hooks import ATTENTION, ModelHooks
from .plot import plot_cache
from .report import CacheReport, report_cache
from .row_groups import RowGroups
from .saving import load_cache, save_cache
from .versions import AnyVersionLayer, forget_window, tokens_to_crop

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["EntryLayer", "ModelCache", "check_dense_layers", "layers_of_model"]


class ModelCache(Cache):
    """The key-value cache of a whole model; subclasses make it by `for_model`.

    Every layer has the `RowGroups` of the batch as `layers[i].cache`: one cache of `kvcluster.fast` (batch, kv_heads,
    entries, dim), or with left padding one for the rows of each padding. Layers that attend to a sliding window are
    transformers' own.
    """

    is_kvcluster = True
    attention: tuple[str, ...] = ATTENTION  # kinds that the model may run

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
        Models are told apart by their config and by a sample of the weights: those that differ only in feed-forward
        layers, or only in layers between the first and the last, are taken for the same.
        """
        return load_cache(cls, path, model, {})

    @property
    def own_layers(self) -> list["EntryLayer"]:
        """The layers that are ours, not transformers'."""
        return [layer for layer in self.layers if not layer.is_sliding]

    @property
    def n_seen(self) -> int:
        """Tokens appended so far, padding included."""
        return self.get_seq_length()

    @property
    def n_stored(self) -> int:
        """Entries held per KV head that is not whole, by the layer of ours that holds most; 0 if all layers slide."""
        return max((layer.cache.n_stored for layer in self.own_layers), default=0)

    @property
    def nbytes(self) -> int:
        """Bytes of what all layers store."""
        return sum(layer.cache.nbytes for layer in self.own_layers) + sum(x.nbytes for x in self.windows)

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
        window_bytes = sum(x.untyped_storage().nbytes() for x in self.windows)
        return sum(layer.cache.nbytes_reserved for layer in self.own_layers) + window_bytes

    def reset(self) -> None:
        """Empty all layers."""
        for layer in self.layers:
            if layer.is_sliding:
                forget_window(layer)
            layer.reset()

    @property
    def padding(self) -> list[int] | None:
        """Padding of each row so far; None if there is none."""
        padded = [layer.cache for layer in self.own_layers if layer.cache.is_padded]
        return padded[0].padding if padded and self.n_seen else None

    @property
    def n_croppable(self) -> int:
        """The most tokens that `crop` can remove now."""
        return min((layer.cache.n_croppable for layer in self.own_layers), default=self.n_seen)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens: `-tokens_to_remove` of them, as assisted decoding does with rejected candidates.

        The cache is then, bit for bit, the one that never saw them. A number that is not negative is how many tokens to
        keep, if that is what the installed transformers means by it (5.23 does not).

        Raises
        ------
        ValueError : more than `n_croppable`: what was clustered in earlier calls cannot be undone. Nothing is removed.
        """
        n_tokens = tokens_to_crop(tokens_to_remove, self.n_seen)
        if n_tokens > self.n_croppable:
            raise ValueError(
                f"crop must remove at most the {self.n_croppable} tokens that were not clustered by earlier calls, "
                f"got {n_tokens}"
            )
        for layer in sorted(self.layers, key=lambda layer: not layer.is_sliding):  # transformers' own may refuse
            layer.crop(tokens_to_remove if layer.is_sliding else n_tokens)


def check_dense_layers(n_dense_layers: int, n_layers: int) -> None:
    if not 0 <= n_dense_layers <= n_layers:
        raise ValueError(f"n_dense_layers must be from 0 to the layers of model, {n_layers}, got {n_dense_layers}")


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
            return self.side_by_side(width, "keys"), self.side_by_side(width, "values")
        return self.held()

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
            self.cache.select(indices.to(self.device))
