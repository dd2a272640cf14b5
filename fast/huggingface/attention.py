"""The attention function that models run while a cache of this package is made for them."""

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from .compiling import uncompiled

__all__ = ["NAME", "attend"]

NAME = "kvcluster"


@uncompiled
def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Attention output (batch, tokens, heads, dim) by the layer of our cache, which a hook has added to the arguments.

    Calls with other caches, and those that the layer leaves to it, go to transformers' own `sdpa` function.
    """
    layer = kwargs.pop("kvcluster_layer", None)
    if layer is not None:
        layer.observe(query)
    if layer is None or not layer.attends(query.shape[2]):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return layer.attend(query, scale=kwargs["scaling"]).transpose(1, 2), None


AttentionInterface.register(NAME, attend)
