"""The attention function that models run while a cache of this package is made for them."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from .compiling import uncompiled

__all__ = ["NAME", "attend", "without_gradients"]

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
        layer.is_attended = True
        layer.observe(query)
    if layer is None or not layer.attends(query.shape[2]):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return without_gradients(layer.attend(query, scale=kwargs["scaling"]), query).transpose(1, 2), None


class WithoutGradients(torch.autograd.Function):
    """The identity, through which no gradient may come."""

    @staticmethod
    def forward(context: Any, array: Tensor, like: Tensor) -> Tensor:
        return array.view_as(array)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        raise RuntimeError(
            "no gradient flows through what a cache of kvcluster has seen in earlier calls: give all tokens in one "
            "call, or call the model without a cache"
        )


def without_gradients(array: Tensor, like: Tensor) -> Tensor:
    """`array`, which depends on earlier calls, for a model that may be differentiated if `like` may be.

    Keys and values that are stored are constants: what a backward pass made of them would be wrong, so it is refused.
    """
    if not (torch.is_grad_enabled() and like.requires_grad):
        return array
    result: Tensor = WithoutGradients.apply(array, like)  # type: ignore[no-untyped-call]
    return result


AttentionInterface.register(NAME, attend)
