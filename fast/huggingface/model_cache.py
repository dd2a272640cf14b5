"""What transformers asks of the cache of a model, as far as all of ours answer alike."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from torch import Tensor, nn
from transformers.cache_utils import Cache

from ..scalars import check_integer
from .hooks import ATTENTION, ModelHooks
from .layers import EntryLayer
from .plot import plot_cache
from .report import CacheReport, report_cache
from .saving import load_cache, save_cache
from .versions import forget_window, tokens_to_crop, window_croppable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ModelCache"]

HALFWAY = -1  # tokens seen, as no cache has them


class ModelCache(Cache):
    """The key-value cache of a whole model; subclasses make it by `for_model`.

    Every layer has the `RowGroups` of the batch as `layers[i].cache`: one cache of `kvcluster.fast` (batch, kv_heads,
    entries, dim), or with left padding one for the rows of each padding. Layers that attend to a sliding window are
    transformers' own.
    """

    is_kvcluster = True
    attention: tuple[str, ...] = ATTENTION  # kinds that the model may run
    prompt: Tensor | None = None  # tokens of the first call, until the next
    begun: int | None = None  # while a call or a change lasts: tokens seen before the call, or HALFWAY

    def __init__(self, layers: list[Any], hooks: ModelHooks, parameters: dict[str, Any]) -> None:
        super().__init__(layers=layers)
        self._hooks, self.parameters = hooks, parameters

    def save(self, path: str | Path) -> None:
        """Write the cache to the safetensors file `path`, the whole of it or nothing; see `load`.

        Raises
        ------
        FileNotFoundError : no such folder.
        OSError : the file cannot be written, such as on a full disk; what `path` held is as it was.
        ValueError : `path` is a folder, a pipe or a device.
        RuntimeError : a call of the model failed halfway, or the model that the cache was made for is gone.
        """
        save_cache(self, self._hooks.model(), path)

    @classmethod
    def load(cls, path: str | Path, model: nn.Module) -> Self:
        """The cache that `save` wrote to `path`, on the device of `model`: it continues as the one that was saved.

        Raises
        ------
        FileNotFoundError, PermissionError : no such file, or none that may be read.
        ValueError : a file of another model, class or format, or one that is not whole; the first difference is named.

        Notes
        -----
        Models are told apart by their config, by a sample of the weights of every layer, and by the adapters of PEFT
        at work. Files of versions before 0.3 tell less: models that differ only in feed-forward layers, or only in
        layers between the first and the last, are taken for the same.
        """
        return load_cache(cls, path, model, {})

    def check_whole(self) -> None:
        """Refuse a cache of which a call or a change failed halfway; where nothing had been taken yet it is whole.

        Raises
        ------
        RuntimeError : the layers do not hold the same tokens, or may not.
        """
        lengths = ({x.get_seq_length()} if x.is_sliding else x.cache.lengths for x in self.layers)
        seen = sorted(set().union(*lengths))
        rule = "an earlier call failed halfway; call reset() and start again"
        if len(seen) > 1:
            got = f"got {seen[0]} to {seen[-1]}"
            raise RuntimeError(f"the layers of the cache must have seen the same tokens, {got}: {rule}")
        if self.begun is not None and seen != [self.begun]:
            raise RuntimeError(f"the layers of the cache must be whole: {rule}")

    def _change(self, layers: list[Any], change: Callable[[Any], None]) -> None:
        """Change each of `layers`; where this fails, all but a refusal of the first, the cache is used no more."""
        self.check_whole()
        self.begun = HALFWAY
        for layer in layers:
            try:
                change(layer)
            except (TypeError, ValueError):
                self.begun = None if layer is layers[0] else HALFWAY
                raise
        self.begun = None

    def __copy__(self) -> Self:
        copied = object.__new__(type(self))
        copied.__dict__.update(self.__dict__)
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        copied = object.__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__ = copy.deepcopy(self.__dict__, memo)
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            f"a {type(self).__name__} must be stored by its own save(path), which load(path, model) reads, and copied "
            "by copy.deepcopy, got pickle, which torch.save and processes use"
        )

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
        """Empty all layers; after that the cache can be used whatever has failed."""
        for layer in self.layers:
            if layer.is_sliding:
                forget_window(layer)
            layer.reset()
        self.begun = self.prompt = None

    @property
    def padding(self) -> list[int] | None:
        """Padding of each row so far; None if there is none."""
        padded = [layer.cache for layer in self.own_layers if layer.cache.is_padded]
        return padded[0].padding if padded and self.n_seen else None

    @property
    def n_croppable(self) -> int:
        """The most tokens that `crop` can remove now."""
        return min(window_croppable(x) if x.is_sliding else x.cache.n_croppable for x in self.layers)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens: `-tokens_to_remove` of them, as assisted decoding does with rejected candidates.

        The cache is then, bit for bit, the one that never saw them. A number that is not negative is how many tokens to
        keep, if that is what the installed transformers means by it (5.23 does not).

        Raises
        ------
        ValueError : more than `n_croppable`: what was clustered in earlier calls cannot be undone, nor what has left a
            sliding window. Nothing is removed.
        """
        n_tokens = tokens_to_crop(tokens_to_remove, self.n_seen)
        if n_tokens > self.n_croppable:
            raise ValueError(
                f"crop must remove at most the {self.n_croppable} tokens that were not clustered by earlier calls and "
                f"can come back into a sliding window, got {n_tokens}"
            )
        # nothing may be there yet, and a window that keeps older tokens is narrowed even by 0
        layers = [x for x in self.layers if not x.is_sliding or n_tokens or getattr(x, "record_past", False)]
        self._change(layers, lambda layer: layer.crop(tokens_to_remove if layer.is_sliding else n_tokens))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the rows `beam_idx` of the batch, in their order."""
        self._change(self.layers, lambda layer: layer.reorder_cache(beam_idx))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Let `repeats` rows side by side follow from each."""
        n = check_integer("repeats", repeats, least=0)
        self._change(self.layers, lambda layer: layer.batch_repeat_interleave(n))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices` of the batch, in their order."""
        self._change(self.layers, lambda layer: layer.batch_select_indices(indices))
