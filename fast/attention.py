"""Full attention on torch tensors."""

import torch
from jaxtyping import Float
from torch import Tensor

from .arguments import check_array

__all__ = ["attention"]


def attention(
    query: Float[Tensor, "*lead queries dim"],
    keys: Float[Tensor, "*lead tokens dim"],
    values: Float[Tensor, "*lead tokens dim_value"],
    *,
    scale: float | None = None,
) -> Float[Tensor, "*lead queries dim_value"]:
    """Values averaged with weights `softmax(scale * query . key)`, in the dtype of `query`.

    Defined, with its errors, by `kvcluster.reference.attention`; computed in float32.
    """
    check_attention(query, keys, values)
    return biased_attention(query, keys, values, None, scale)


def biased_attention(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, scale: float | None) -> Tensor:
    """Attention in float32 with `bias` (..., 1, entries) added to the logits."""
    if scale is None:
        scale = query.shape[-1] ** -0.5
    with torch.autocast(query.device.type, enabled=False):
        logits = scale * (query.float() @ keys.float().mT)  # (..., queries, entries)
        if bias is not None:
            logits = logits + bias
        return (logits.softmax(dim=-1) @ values.float()).to(query.dtype)  # (..., queries, dim_value)


def check_attention(query: Tensor, keys: Tensor, values: Tensor) -> None:
    """Refuse tensors that do not fit each other."""
    arrays = {"query": query, "keys": keys, "values": values}
    devices = {str(array.device) for array in arrays.values() if isinstance(array, Tensor)}
    if len(devices) > 1:
        raise ValueError(f"query, keys and values must be on one device, got {', '.join(sorted(devices))}")
    for name, array in arrays.items():
        check_array(name, array)
    shapes = [tuple(array.shape) for array in (query, keys, values)]
    if keys.shape[-2] == 0:
        raise ValueError(f"keys must hold at least one token, got shape {shapes[1]}")
    if values.shape[:-1] != keys.shape[:-1]:
        raise ValueError(
            f"values must have the leading axes and tokens of keys, got values {shapes[2]} and keys {shapes[1]}"
        )
    if query.shape[:-2] != keys.shape[:-2] or query.shape[-1] != keys.shape[-1]:
        raise ValueError(f"query must have the leading axes and dim of keys, got query {shapes[0]}, keys {shapes[1]}")
