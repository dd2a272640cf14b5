"""Attention to a clustered cache on torch tensors."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .arguments import dtype_name
from .attention import biased_attention, check_attention

__all__ = ["clustered_attention", "log_counts"]


def clustered_attention(
    query: Float[Tensor, "*lead queries dim"],
    keys: Float[Tensor, "*lead entries dim"],
    values: Float[Tensor, "*lead entries dim_value"],
    counts: Int[Tensor, "*lead entries"],
    *,
    scale: float | None = None,
) -> Float[Tensor, "*lead queries dim_value"]:
    """Values averaged with weights `softmax(scale * query . key + log(count))`, in the dtype of `query`.

    Defined, with its errors, by `kvcluster.reference.clustered_attention`; computed in float32.
    """
    check_attention(query, keys, values)
    check_counts(keys, counts)
    return biased_attention(query, keys, values, log_counts(counts).unsqueeze(-2), scale)


def log_counts(counts: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Natural logarithm of the counts in float32, minus infinity where a count is 0."""
    return counts.double().log().float()


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
    if not bool((counts > 0).any(dim=-1).all()):
        raise ValueError("counts must have an entry above 0 for every leading index, got only 0")
