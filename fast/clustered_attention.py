"""Attention to a clustered cache on torch tensors."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .arguments import dtype_name
from .attention import attend_any, check_attention
from .backends import AttentionBackend

__all__ = ["clustered_attention"]


def clustered_attention(
    query: Float[Tensor, "*lead queries dim"],
    keys: Float[Tensor, "*lead entries dim"],
    values: Float[Tensor, "*lead entries dim_value"],
    counts: Int[Tensor, "*lead entries"],
    *,
    scale: float | None = None,
    backend: AttentionBackend = "auto",
) -> Float[Tensor, "*lead queries dim_value"]:
    """Values averaged with weights `softmax(scale * query . key + log(count))`, in the dtype of `query`.

    Defined, with its errors, by `kvcluster.reference.clustered_attention`; computed in float32. `backend` as
    in `choose_attention_backend`. Counts must be below 2**31.
    """
    check_attention(query, keys, values)
    check_counts(keys, counts)
    return attend_any(query, keys, values, counts, scale, backend)


def check_counts(keys: Tensor, counts: Tensor) -> None:
    """Refuse counts that do not belong to `keys`."""
    if not isinstance(counts, Tensor):
        raise TypeError(f"counts must be a torch tensor, got {type(counts).__name__}")
    if counts.is_floating_point() or counts.is_complex() or counts.dtype == torch.bool:
        raise ValueError(f"counts must be integers, got {dtype_name(counts)}")
    if counts.shape != keys.shape[:-1]:
        raise ValueError(
            f"counts must have the shape of keys without dim, got {tuple(counts.shape)} and {tuple(keys.shape)}"
        )
    if bool((counts < 0).any()):
        raise ValueError(f"counts must be at least 0, got {int(counts.min())}")
    if counts.dtype != torch.int32 and bool((counts >= 2**31).any()):
        raise ValueError(f"counts must be below 2**31, got {int(counts.max())}")
    if not bool((counts > 0).any(dim=-1).all()):
        raise ValueError("counts must have an entry above 0 for every leading index, got only 0")
