"""A transformers `Cache` as the paper has it, as far as that is known: budget, pooled matching, whole heads."""

import warnings
from typing import Any

from torch import nn

from ..chelsea_cache import ChelseaCache as LayerCache
from .entry_layer import ClusteredLayer
from .head_pairs import HeadPairs, heads_of_layers
from .hooks import ModelHooks, check_model
from .layers import layers_of_model
from .model_cache import ModelCache
from .profiles import known_whole_heads

__all__ = ["ChelseaCache"]


class ChelseaCache(ModelCache):
    """The key-value cache of a whole model, compressed to a budget whenever it outgrows it; made by `for_model`.

    Every layer holds a `kvcluster.fast.ChelseaCache` (batch, kv_heads, entries, dim), see `RowGroups`; layers that
    attend to a sliding window stay transformers' own.

    Notes
    -----
    The published method (arXiv:2506.11418v1), as far as its abstract, a digest of v1 by a third party and our choices
    make one: docs/papers.md says which is which. It is meant for a prompt that ends with its question: that is
    attended to exactly, then compressed. What the cache holds depends on how the tokens come: a prompt in pieces is
    compressed piece by piece. `ClusteredCache` does not.
    Positions, attention, padding, beams and `crop` are as in `ClusteredCache`.
    """

    @classmethod
    def for_model(
        cls,
        model: nn.Module,
        *,
        ratio: float,
        max_new_tokens: int,
        n_prompt: int | None = None,
        interval: int = 64,
        whole_heads: HeadPairs | None = None,
        chunk_size: int = 256,
        n_sink: int = 16,
        n_recent: int = 64,
    ) -> "ChelseaCache":
        """An empty cache for `model`, to be passed as `past_key_values=` to its `generate` or `forward`.

        Parameters
        ----------
        model : a transformers model of the types that `ClusteredCache.for_model` takes.
        ratio : entries / tokens of prompt and generation, of the heads that are not whole, in (0, 1].
        max_new_tokens : as given to `generate`.
        n_prompt : tokens of a prompt that comes in pieces; None for one that comes in a single call.
        whole_heads : (layer, KV head) of heads that keep every token. None: those that are known for this model, 4 % of
            its KV heads; for another model none, with a warning that names `kvcluster tune`, which finds them.
        interval, chunk_size, n_sink, n_recent : as in `kvcluster.reference.ChelseaCache`, for every layer.

        Raises
        ------
        ValueError : another type of model or of attention; a field of its config that is not served; a parameter out
            of range; else as `heads_of_layers`.

        Examples
        --------
        ::

            cache = ChelseaCache.for_model(model, ratio=0.2, max_new_tokens=100)
            tokens = model.generate(**inputs, past_key_values=cache, max_new_tokens=100)
        """
        config = check_model(model)
        if whole_heads is None:
            whole_heads = known_or_none(model)
        heads = heads_of_layers(model, whole_heads)
        settings: dict[str, Any] = {
            "ratio": ratio,
            "max_new_tokens": max_new_tokens,
            "n_prompt": n_prompt,
            "interval": interval,
            "chunk_size": chunk_size,
            "n_sink": n_sink,
            "n_recent": n_recent,
        }
        checked = LayerCache(**settings)  # also for a model whose layers all slide
        settings = {name: getattr(checked, name) for name in settings}
        are_alike = len(set(heads)) == 1
        layers = layers_of_model(
            config,
            lambda index: ClusteredLayer(lambda: LayerCache(whole_heads=heads[index], **settings), are_alike=are_alike),
        )
        return cls(
            layers, ModelHooks.of(model), settings | {"whole_heads": [list(map(int, pair)) for pair in whole_heads]}
        )


def known_or_none(model: nn.Module) -> HeadPairs:
    """The whole heads that are known for `model`; without any, a warning."""
    try:
        return known_whole_heads(model)
    except LookupError as error:
        warnings.warn(f"no head stays whole, which costs most of what the method can do: {error}", stacklevel=4)
        return ()
