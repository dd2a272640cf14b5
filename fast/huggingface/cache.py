"""A transformers `Cache` whose layers are clustered caches."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import check_method
from ..attention import attend_entries
from ..bounded_cache import BoundedCache
from ..cache import ClusteredCache as LayerCache
from ..distinctive_matching import Distinctive
from ..exact.entries import log_counts
from ..methods import Method
from ..soft_matching import SoftMatching
from .hooks import ModelHooks, check_model
from .layers import EntryLayer, ModelCache, check_dense_layers, layers_of_model

__all__ = ["ClusteredCache", "ClusteredLayer"]


class ClusteredCache(ModelCache):
    """The key-value cache of a whole model, clustered layer by layer; made by `for_model`.

    Every layer holds a `kvcluster.fast.ClusteredCache` (batch, kv_heads, entries, dim), see `RowGroups`, but for
    layers that attend to a sliding window (all those of a `mistral` that has one): they stay transformers' own.

    Notes
    -----
    A prompt given at once is attended to exactly and clustered afterwards; later tokens attend to what is stored. With
    `keep_ratio` 1 every bit is that of a stock cache.
    Positions stay those of the tokens seen. Attention to what is stored is this package's own (`attend_entries`),
    reached by forward hooks on the model that exist as long as a cache made for it does and that leave calls with other
    caches alone. Only a model that runs `eager` attention keeps it: there the log counts are an additive mask, for
    several new tokens of shape (batch, heads, new tokens, entries + new tokens) per layer.
    Batches may have padding on the left: the rows' caches are those of the rows alone. Beams may be reordered; tokens
    of the last call may be taken out again by `crop`, as assisted decoding does. See docs/modes.md.
    """

    @classmethod
    def for_model(
        cls,
        model: nn.Module,
        *,
        keep_ratio: float | Sequence[float] | None = None,
        budget: int | Sequence[int] | None = None,
        n_dense_layers: int = 0,
        method: Method = Distinctive(),
        chunk_size: int = 256,
        n_sink: int = 4,
        n_recent: int = 252,
    ) -> "ClusteredCache":
        """An empty cache for `model`, to be passed as `past_key_values=` to its `generate` or `forward`.

        Parameters
        ----------
        model : a transformers model of type `llama`, `mistral`, `qwen2`, `qwen3`, `smollm3` or `gemma3_text`, with
            `sdpa` or `eager` attention.
        keep_ratio : entries kept / tokens of what is clustered; 1 by default if there is a budget.
        budget : the most entries that a KV head stores between two calls, sinks and recent tokens included. As tokens
            come, clusters are merged further. Without it entries grow with the tokens. Needs
            `method=SoftMatching()`.
            Both may be sequences, of one number for each layer of the model.
        n_dense_layers : first layers that keep every token (sliding ones are counted, but keep to their window).
        method : how chunks are clustered. `Distinctive()` keeps distinctive tokens exact, which loses far less of what
            may be asked later: see benchmarks/quality/QUALITY.md. The published method is `SoftMatching()`, in this
            project's examples with `chunk_size=64, n_recent=64`.
        chunk_size, n_sink, n_recent : as in `kvcluster.reference.ClusteredCache`, for every layer.

        Raises
        ------
        ValueError : another type of model or of attention; a field of its config that is not served; a parameter out
            of range; neither `keep_ratio` nor `budget`; a budget with another method; a sequence of another length
            than the model's layers.

        Examples
        --------
        ::

            cache = ClusteredCache.for_model(model, keep_ratio=0.25)
            tokens = model.generate(**inputs, past_key_values=cache, max_new_tokens=100)
        """
        config = check_model(model)
        if keep_ratio is None and budget is None:
            raise ValueError("keep_ratio or budget must be given, got neither")
        n_layers = config.num_hidden_layers
        check_dense_layers(n_dense_layers, n_layers)
        ratios = one_for_each_layer("keep_ratio", 1.0 if keep_ratio is None else keep_ratio, n_layers)
        budgets = one_for_each_layer("budget", budget, n_layers)
        check_method(method)
        if budget is not None and not isinstance(method, SoftMatching):
            raise ValueError(f"method must be SoftMatching() with a budget, which merges all tokens, got {method}")
        shared: dict[str, Any] = {"chunk_size": chunk_size, "n_sink": n_sink, "n_recent": n_recent}
        chosen = [
            (1.0, None) if index < n_dense_layers else (ratios[index], budgets[index]) for index in range(n_layers)
        ]
        are_alike = len(set(chosen)) == 1

        def make(index: int) -> LayerCache:
            ratio, most = chosen[index]
            if most is None:
                return LayerCache(keep_ratio=ratio, method=method, **shared)
            return BoundedCache(budget=most, keep_ratio=ratio, **shared)

        layers = layers_of_model(config, lambda index: ClusteredLayer(partial(make, index), are_alike=are_alike))
        parameters = {"keep_ratio": keep_ratio, "budget": budget, "n_dense_layers": n_dense_layers, "method": method}
        return cls(layers, ModelHooks.of(model), parameters | shared)


def one_for_each_layer(name: str, value: Any, n_layers: int) -> list[Any]:
    """`value` for every layer, or the numbers of a sequence."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        return [value] * n_layers
    if len(value) != n_layers:
        raise ValueError(f"{name} must be one number or one for each of the {n_layers} layers, got {len(value)}")
    return list(value)


class ClusteredLayer(EntryLayer):
    """One layer of a `ClusteredCache`; unless all layers are alike, transformers' one mask does not fit them all."""

    def __init__(self, make: Callable[[], LayerCache], *, are_alike: bool) -> None:
        self.make, self.are_alike = make, are_alike
        super().__init__()

    @property
    def has_plain_mask(self) -> bool:
        """Whether new tokens may attend to what is stored by transformers' mask as it is."""
        return self.are_alike and not self.has_centroids and not self.cache.is_padded

    @property
    def has_centroids(self) -> bool:
        """Whether any entry stands for more than one token."""
        return self.cache.n_stored < self.cache.n_seen

    def attends(self, queries: int) -> bool:
        """A first call, and all calls without centroids, are left to transformers, so that their bits are stock's."""
        return not self.is_first and not self.has_plain_mask

    def attend_to(self, cache: LayerCache, query: Tensor, scale: float) -> Tensor:
        rows = self.by_kv_head(query)
        entries = cache.keys, cache.values, cache.counts
        output = attend_entries(rows, *entries, queries=query.shape[2], scale=scale)
        return output.reshape(*query.shape[:-1], -1)

    def mask_with_log_counts(self, mask: Tensor | None, queries: int, group: int) -> Tensor | None:
        """`mask` (batch, 1, queries, entries + queries), float, for the next `queries` tokens, log counts added."""
        if self.cache.n_seen == 0 or self.has_plain_mask:
            return mask
        counts = self.counts_with(queries)
        bias = log_counts(counts).repeat_interleave(group, dim=1).unsqueeze(-2)  # (batch, heads, 1, entries + queries)
        columns = counts.shape[-1]
        is_later = torch.ones(queries, columns, dtype=torch.bool, device=bias.device).triu(columns - queries + 1)
        return bias.masked_fill(is_later, -torch.inf).clamp(min=torch.finfo(bias.dtype).min)

    def counts_with(self, queries: int) -> Tensor:
        """Counts (batch, kv_heads, entries + queries) of what is stored and of the next tokens, 0 for padding."""
        if self.cache.is_padded:
            stored = self.cache.side_by_side(self.cache.n_stored, "counts")
            padding = torch.tensor(self.padding, device=stored.device) - self.cache.n_seen  # among the next tokens
            new = torch.arange(queries, device=stored.device) >= padding[:, None]  # (batch, queries)
        else:
            stored = self.cache.caches[0].counts
            new = stored.new_ones(len(stored), queries)
        return torch.cat([stored, new[:, None].expand(-1, stored.shape[1], -1).to(stored.dtype)], dim=-1)
