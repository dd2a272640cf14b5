"""A transformers `Cache` whose layers are clustered caches."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..cache import ClusteredCache as LayerCache
from ..entry_attention import attend_entries, log_counts
from .hooks import ModelHooks, check_model
from .layers import EntryLayer, ModelCache, check_dense_layers, layers_of_model
from .row_groups import RowGroups

__all__ = ["ClusteredCache", "ClusteredLayer"]


class ClusteredCache(ModelCache):
    """The key-value cache of a whole model, clustered layer by layer; made by `for_model`.

    Every layer holds a `kvcluster.fast.ClusteredCache` (batch, kv_heads, entries, dim) as `layers[i].entries`, but for
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
        chunk_size: int = 256,
        n_sink: int = 4,
        n_recent: int = 252,
        n_shared: int | None = 4,
    ) -> "ClusteredCache":
        """An empty cache for `model`, to be passed as `past_key_values=` to its `generate` or `forward`.

        Parameters
        ----------
        model : a transformers model of type `llama`, `mistral`, `qwen2`, `qwen3`, `smollm3` or `gemma3_text`, with
            `sdpa` or `eager` attention.
        keep_ratio : entries kept / tokens of what is clustered; 1 by default if there is a budget.
        budget : the most entries that a KV head stores between two calls, sinks and recent tokens included. As tokens
            come, clusters are merged further. Without it entries grow with the tokens. Needs `n_shared=None`.
            Both may be sequences, of one number for each layer of the model.
        n_dense_layers : first layers that keep every token (sliding ones are counted, but keep to their window).
        chunk_size, n_sink, n_recent, n_shared : as in `kvcluster.reference.ClusteredCache`, for every layer. These
            defaults keep distinctive tokens exact, which loses far less of what may be asked later: see
            benchmarks/quality/QUALITY.md. The published method is `n_shared=None`, in this project's examples with
            `chunk_size=64, n_recent=64`.

        Raises
        ------
        ValueError : another type of model or of attention; a field of its config that is not served; a parameter out
            of range; neither `keep_ratio` nor `budget`; a sequence of another length than the model's layers.

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
        shared: dict[str, Any] = {
            "chunk_size": chunk_size,
            "n_sink": n_sink,
            "n_recent": n_recent,
            "n_shared": n_shared,
        }
        chosen = [
            (1.0, None) if index < n_dense_layers else (ratios[index], budgets[index]) for index in range(n_layers)
        ]
        are_alike = len(set(chosen)) == 1
        layers = layers_of_model(
            config,
            lambda index: ClusteredLayer(
                {"keep_ratio": chosen[index][0], "budget": chosen[index][1], **shared}, are_alike=are_alike
            ),
        )
        given = {"keep_ratio": keep_ratio, "budget": budget, "n_dense_layers": n_dense_layers, **shared}
        return cls(layers, ModelHooks.of(model), given)


def one_for_each_layer(name: str, given: Any, n_layers: int) -> list[Any]:
    """`given` for every layer, or the numbers of a sequence."""
    if isinstance(given, str) or not isinstance(given, Sequence):
        return [given] * n_layers
    if len(given) != n_layers:
        raise ValueError(f"{name} must be one number or one for each of the {n_layers} layers, got {len(given)}")
    return list(given)


class ClusteredLayer(EntryLayer):
    """One layer of a `ClusteredCache`; with other layers that are not like it, transformers' one mask fits not all."""

    def __init__(self, parameters: dict[str, Any], *, are_alike: bool) -> None:
        self.parameters, self.are_alike = parameters, are_alike
        super().__init__()

    def make(self) -> LayerCache:
        return LayerCache(**self.parameters)

    @property
    def has_plain_mask(self) -> bool:
        """Whether new tokens may attend to what is stored by transformers' mask as it is."""
        return self.are_alike and not self.has_centroids and not isinstance(self.entries, RowGroups)

    @property
    def has_centroids(self) -> bool:
        """Whether any entry stands for more than one token."""
        return self.entries.n_stored < self.entries.n_seen

    def attends(self, queries: int) -> bool:
        """A first call, and all calls without centroids, are left to transformers, whose bits are stock's."""
        return not self.is_first and not self.has_plain_mask

    def attend_to(self, entries: LayerCache, query: Tensor, scale: float) -> Tensor:
        rows = self.by_kv_head(query)
        held = entries.keys, entries.values, entries.counts
        output = attend_entries(rows, *held, queries=query.shape[2], scale=scale)
        return output.reshape(*query.shape[:-1], -1)

    def mask_with_log_counts(self, mask: Tensor | None, queries: int, group: int) -> Tensor | None:
        """`mask` (batch, 1, queries, entries + queries), float, for the next `queries` tokens, log counts added."""
        if self.entries.n_seen == 0 or self.has_plain_mask:
            return mask
        counts = self.counts_with(queries)
        bias = log_counts(counts).repeat_interleave(group, dim=1).unsqueeze(-2)  # (batch, heads, 1, entries + queries)
        columns = counts.shape[-1]
        is_later = torch.ones(queries, columns, dtype=torch.bool, device=bias.device).triu(columns - queries + 1)
        return bias.masked_fill(is_later, -torch.inf).clamp(min=torch.finfo(bias.dtype).min)

    def counts_with(self, queries: int) -> Tensor:
        """Counts (batch, kv_heads, entries + queries) of what is stored and of the next tokens, 0 for padding."""
        if isinstance(self.entries, RowGroups):
            held = self.entries.side_by_side(self.entries.n_stored, "counts")
            padding = torch.tensor(self.padding, device=held.device) - self.entries.n_seen  # among the next tokens
            new = torch.arange(queries, device=held.device) >= padding[:, None]  # (batch, queries)
        else:
            held = self.entries.counts
            new = held.new_ones(len(held), queries)
        return torch.cat([held, new[:, None].expand(-1, held.shape[1], -1).to(held.dtype)], dim=-1)
