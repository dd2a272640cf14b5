"""A transformers `Cache` that forgets nothing: each new token recalls the clusters nearest to it."""

from typing import Any

from torch import Tensor, nn

from ..recall_cache import RecallCache as LayerCache
from .hooks import ModelHooks, check_model
from .layers import EntryLayer, ModelCache

__all__ = ["RecallCache", "RecallLayer"]


class RecallCache(ModelCache):
    """The key-value cache of a whole model, recalled cluster by cluster; made by `for_model`.

    Every layer holds a `kvcluster.fast.RecallCache` (batch, kv_heads, tokens, dim) as `layers[i].entries`.

    Notes
    -----
    All tokens are kept. A token that comes alone, as in decoding, attends to at most `budget` tokens per KV head, its
    own choice in each layer and KV head, shared by the query heads of the group. Several new tokens at once, as of a
    prompt or of a second turn, attend to all tokens, as in a stock cache; so does every token while there are no more
    tokens than `budget`. Batches must have no padding; beams may be reordered; `crop` (assisted decoding) is refused.
    """

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
        is_centred: bool = False,
        spread: float = 0.5,
        mass: float | None = None,
        centroids_for_rest: bool = False,
    ) -> "RecallCache":
        """An empty cache for `model`, to be passed as `past_key_values=` to its `generate` or `forward`.

        Parameters
        ----------
        model : a transformers model of type `llama` with `sdpa` attention.
        budget : tokens that a new token attends to per KV head, sinks and recent tokens included.
        n_dense_layers : first layers that attend to all tokens; 2 in the paper (arXiv:2412.03213).
        n_sink, ... : as in `kvcluster.reference.RecallCache`, for every layer.

        Raises
        ------
        ValueError : another type of model or of attention; a parameter out of range.

        Examples
        --------
        ::

            cache = RecallCache.for_model(model, budget=512)
            tokens = model.generate(**inputs, past_key_values=cache, max_new_tokens=100)
        """
        config = check_model(model, attention=("sdpa",))
        if not 0 <= n_dense_layers <= config.num_hidden_layers:
            raise ValueError(
                f"n_dense_layers must be from 0 to the layers of model, {config.num_hidden_layers}, "
                f"got {n_dense_layers}"
            )
        parameters = {
            "budget": budget,
            "n_sink": n_sink,
            "n_recent": n_recent,
            "tokens_per_cluster": tokens_per_cluster,
            "segment_size": segment_size,
            "prompt_segment_size": prompt_segment_size,
            "max_iter": max_iter,
            "is_centred": is_centred,
            "spread": spread,
            "mass": mass,
            "centroids_for_rest": centroids_for_rest,
        }
        layers = [RecallLayer(index < n_dense_layers, parameters) for index in range(config.num_hidden_layers)]
        return cls(layers, ModelHooks.of(model))


class RecallLayer(EntryLayer):
    """One layer of a `RecallCache`; a dense one keeps its tokens unclustered and attends to all of them."""

    def __init__(self, is_dense: bool, parameters: dict[str, Any]) -> None:
        self.is_dense, self.parameters = is_dense, parameters
        super().__init__()

    def reset(self) -> None:
        self.entries = LayerCache(**self.parameters)
        super().reset()

    def held(self) -> tuple[Tensor, Tensor]:
        """In the order of memory, clusters together: `keys` and `values` would be copies."""
        return self.entries.stored

    def attends(self, queries: int) -> bool:
        return queries == 1 and not self.is_dense and self.entries.n_seen > self.parameters["budget"]

    def attend(self, query: Tensor, *, scale: float) -> Tensor:
        return self.entries.attend(self.by_kv_head(query), scale=scale).reshape(*query.shape[:-1], -1)

    def finish(self) -> None:
        if not self.is_dense:
            super().finish()
