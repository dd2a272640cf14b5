"""A transformers `Cache` that forgets nothing: each new token recalls the clusters nearest to it."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Self

from torch import Tensor, nn

from ..attention import attend_entries
from ..memory.segments import RecallSettings
from ..recall_cache import RecallCache as LayerCache
from ..tiers import TieredRecallCache, TierStatistics
from .hooks import ModelHooks, check_model
from .layers import EntryLayer, check_dense_layers, layers_of_model
from .model_cache import ModelCache
from .saving import load_cache

__all__ = ["RecallCache", "RecallLayer"]


class RecallCache(ModelCache):
    """The key-value cache of a whole model, recalled cluster by cluster; made by `for_model`.

    Every layer holds a `kvcluster.fast.RecallCache` (batch, kv_heads, tokens, dim), see `RowGroups`, but for layers
    that attend to a sliding window (all those of a `mistral` that has one): they stay transformers' own.

    Notes
    -----
    All tokens are kept. A token that comes alone, as in decoding, attends to at most `budget` tokens per KV head, its
    own choice in each layer and KV head, shared by the query heads of the group unless `is_per_query_head`. Several
    new tokens at once, as of a prompt or of a second turn, attend to all tokens, as in a stock cache; so does every
    token while the budget covers all of them. Batches may have padding on the left: the rows' caches are those of the
    rows alone. Beams may be reordered; tokens of the last call may be taken out again by `crop`, as assisted decoding
    does.
    See docs/modes.md.
    """

    attention = ("sdpa",)

    @classmethod
    def for_model(
        cls,
        model: nn.Module,
        *,
        budget: int,
        n_dense_layers: int = 0,
        n_sink: int = 16,
        n_recent: int = 1,
        tokens_per_cluster: int = 8,
        segment_size: int | None = None,
        prompt_segment_size: int | None = 512,
        max_iter: int = 4,
        spread: float = 0.5,
        centroids_for_rest: bool = False,
        init_seed: int | None = None,
        is_per_query_head: bool = False,
        is_exact_counted: bool = True,
        bits: int | tuple[int, int] = 16,
        offloading: bool = False,
        folder: str | Path | None = None,
        n_steps: int = 1,
    ) -> "RecallCache":
        """An empty cache for `model`, to be passed as `past_key_values=` to its `generate` or `forward`.

        Parameters
        ----------
        model : a transformers model with `sdpa` attention, of the types that `ClusteredCache.for_model` takes.
        budget : tokens that a new token attends to per KV head, sinks and recent tokens included.
        n_dense_layers : first layers that attend to all tokens (sliding ones are counted, but keep to their window);
            2 in the paper (arXiv:2412.03213).
        n_sink, ... : as in `kvcluster.reference.RecallCache`, for every layer.
        bits : of the body's numbers, 8, 4, 3 or 2, or a pair of these for keys and for values; not in dense layers.
            Steps read back what they recall, several new tokens at once all of it.
        init_seed : layer i of n draws with the seed `(init_seed * n + i) % 2**32`; None: nothing is drawn.
        offloading : keep keys and values in slow memory, except those of the clusters that were recalled in the last
            `n_steps` steps: see `kvcluster.fast.tiers.TieredRecallCache`, also for `folder`. Dense layers, whose steps
            read all of them, stay in fast memory. The tokens generated are the same.

        Raises
        ------
        ValueError : another type of model or of attention; a field of its config that is not served; a parameter out
            of range.

        Examples
        --------
        ::

            cache = RecallCache.for_model(model, budget=512)
            tokens = model.generate(**inputs, past_key_values=cache, max_new_tokens=100)
        """
        config = check_model(model, cls.attention)
        n_dense_layers = check_dense_layers(n_dense_layers, config.num_hidden_layers)
        settings = RecallSettings(
            budget=budget,
            n_sink=n_sink,
            n_recent=n_recent,
            tokens_per_cluster=tokens_per_cluster,
            segment_size=segment_size,
            prompt_segment_size=prompt_segment_size,
            max_iter=max_iter,
            spread=spread,
            centroids_for_rest=centroids_for_rest,
            init_seed=init_seed,
            is_per_query_head=is_per_query_head,
            is_exact_counted=is_exact_counted,
            bits=bits,
        )
        tiers = {"folder": folder, "n_steps": n_steps} if offloading else {}
        if not offloading and (folder is not None or n_steps != 1):
            raise ValueError(f"offloading must be True for a folder or n_steps, got {folder!r} and {n_steps}")

        def layer(index: int) -> RecallLayer:
            is_dense = index < n_dense_layers
            of_layer = replace(settings, bits=16) if is_dense else settings
            if settings.init_seed is not None:
                of_layer = replace(of_layer, init_seed=(settings.init_seed * config.num_hidden_layers + index) % 2**32)
            return RecallLayer(is_dense, of_layer, {} if is_dense else tiers)

        layers = layers_of_model(config, layer)
        parameters = asdict(settings) | {"n_dense_layers": n_dense_layers}
        if segment_size is None:  # of two budgets it need not be the same
            parameters["segment_size"] = None
        del parameters["is_centred"]  # never asked for here
        return cls(layers, ModelHooks.of(model), parameters)

    @classmethod
    def as_published(
        cls,
        model: nn.Module,
        *,
        budget: int,
        seed: int = 0,
        offloading: bool = False,
        folder: str | Path | None = None,
        n_steps: int = 1,
    ) -> "RecallCache":
        """An empty cache with the settings of the paper (arXiv:2412.03213, DAC 2025), two dense layers included.

        Parameters
        ----------
        model : as in `for_model`, of two layers or more.
        budget, seed : as in `kvcluster.reference.RecallCache.as_published`; `budget` tokens are recalled beside sinks
            and tokens that wait for a cluster.
        offloading, folder, n_steps : as in `for_model`; the paper offloads, and its R, our `n_steps`, is 1.

        Raises
        ------
        ValueError : as `for_model`.
        """
        settings = asdict(RecallSettings.as_published(budget=budget, seed=seed))
        del settings["is_centred"]
        return cls.for_model(model, n_dense_layers=2, offloading=offloading, folder=folder, n_steps=n_steps, **settings)

    @classmethod
    def load(
        cls,
        path: str | Path,
        model: nn.Module,
        *,
        offloading: bool = False,
        folder: str | Path | None = None,
        n_steps: int = 1,
    ) -> Self:
        """As `ModelCache.load`; `offloading`, `folder` and `n_steps` as in `for_model`, however it was saved."""
        return load_cache(cls, path, model, {"offloading": offloading, "folder": folder, "n_steps": n_steps})

    @property
    def statistics(self) -> TierStatistics | None:
        """Sums over the layers that are offloaded; None if none is."""
        caches = [cache for layer in self.own_layers for cache in layer.cache.caches]
        tiered = [cache.statistics for cache in caches if isinstance(cache, TieredRecallCache)]
        return sum(tiered, TierStatistics()) if tiered else None


class RecallLayer(EntryLayer):
    """One layer of a `RecallCache`; a dense one keeps its tokens unclustered and attends to all of them."""

    def __init__(self, is_dense: bool, settings: RecallSettings, tiers: dict[str, Any]) -> None:
        self.is_dense, self.settings, self.tiers = is_dense, settings, tiers
        super().__init__()

    def make(self) -> LayerCache:
        if self.tiers:
            return TieredRecallCache(self.settings, **self.tiers)
        return LayerCache(**asdict(self.settings))

    def held(self) -> tuple[Tensor, Tensor]:
        """In the order of memory, clusters together: `keys` and `values` would be copies."""
        keys, values = self.cache.caches[0].stored
        return keys.to(self.device), values.to(self.device)

    def attends(self, queries: int) -> bool:
        if self.cache.is_padded:
            return not self.is_first
        return self.recalls(self.cache.caches[0], queries)

    def recalls(self, cache: LayerCache, queries: int) -> bool:
        """Whether `queries` new tokens attend to what they recall rather than to all."""
        is_covered = cache.n_clustered <= self.settings.budget_of_body(cache.n_seen - cache.n_clustered)
        return queries == 1 and not self.is_dense and not is_covered

    def attend_to(self, cache: LayerCache, query: Tensor, scale: float) -> Tensor:
        rows = self.by_kv_head(query)
        if self.recalls(cache, query.shape[2]):
            output = cache.attend(rows, scale=scale)
        else:
            keys, values = (array.to(self.device) for array in cache.stored)
            output = attend_entries(rows, keys, values, None, queries=query.shape[2], scale=scale)
        return output.reshape(*query.shape[:-1], -1)

    def finish(self) -> None:
        if not self.is_dense:
            super().finish()
