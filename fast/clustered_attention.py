"""Attention to a clustered cache on torch tensors."""

from jaxtyping import Float, Int
from torch import Tensor

from .attention import attend_any
from .backends import AnyBackend

__all__ = ["clustered_attention"]


def clustered_attention(
    query: Float[Tensor, "*lead queries dim"],
    keys: Float[Tensor, "*lead entries dim"],
    values: Float[Tensor, "*lead entries dim_value"],
    counts: Int[Tensor, "*lead entries"],
    *,
    scale: float | None = None,
    backend: AnyBackend = "auto",
) -> Float[Tensor, "*lead queries dim_value"]:
    """Values averaged with weights `softmax(scale * query . key + log(count))`, in the dtype of `query`.

    Defined, with its errors, by `kvcluster.reference.clustered_attention`; computed in float32. `backend` as in
    `choose`. Counts must be below 2**31.
    """
    return attend_any(query, keys, values, counts, scale, backend, has_counts=True)
