"""Full attention on torch tensors."""

import torch
from jaxtyping import Float
from torch import Tensor

from .arguments import check_array, with_four_axes
from .backends import AttentionBackend
from .entry_attention import attend_entries

__all__ = ["attention"]


def attention(
    query: Float[Tensor, "*lead queries dim"],
    keys: Float[Tensor, "*lead tokens dim"],
    values: Float[Tensor, "*lead tokens dim_value"],
    *,
    scale: float | None = None,
    backend: AttentionBackend = "auto",
) -> Float[Tensor, "*lead queries dim_value"]:
    """Values averaged with weights `softmax(scale * query . key)`, in the dtype of `query`.

    Defined, with its errors, by `kvcluster.reference.attention`; computed in float32. `backend` as in
    `choose_attention_backend`.
    """
    check_attention(query, keys, values)
    return attend_any(query, keys, values, None, scale, backend)


def attend_any(
    query: Tensor, keys: Tensor, values: Tensor, counts: Tensor | None, scale: float | None, backend: AttentionBackend
) -> Tensor:
    """`attend_entries` of tensors with any leading axes."""
    if counts is not None:
        counts = with_four_axes(counts.to(torch.int32).unsqueeze(-1)).squeeze(-1)
    rows, keys4, values4 = map(with_four_axes, (query, keys, values))
    output = attend_entries(rows, keys4, values4, counts, scale=scale, backend=backend)
    return output.reshape(*query.shape[:-1], values.shape[-1])


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
