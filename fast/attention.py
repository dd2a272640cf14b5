"""Full attention on torch tensors."""

import torch
from jaxtyping import Float, Int32
from torch import Tensor

from .arguments import check_attention, scale_of, with_four_axes
from .backends import AnyBackend, implementation

__all__ = ["attend_any", "attend_entries", "attention"]


def attention(
    query: Float[Tensor, "*lead queries dim"],
    keys: Float[Tensor, "*lead tokens dim"],
    values: Float[Tensor, "*lead tokens dim_value"],
    *,
    scale: float | None = None,
    backend: AnyBackend = "auto",
) -> Float[Tensor, "*lead queries dim_value"]:
    """Values averaged with weights `softmax(scale * query . key)`, in the dtype of `query`.

    Defined, with its errors, by `kvcluster.reference.attention`; computed in float32. `backend` as in `choose`.
    """
    check_attention(query, keys, values)
    return attend_any(query, keys, values, None, scale, backend)


def attend_any(
    query: Tensor, keys: Tensor, values: Tensor, counts: Tensor | None, scale: float | None, backend: AnyBackend
) -> Tensor:
    """`attend_entries` of tensors with any leading axes."""
    if counts is not None:
        counts = with_four_axes(counts.to(torch.int32).unsqueeze(-1)).squeeze(-1)
    rows, keys4, values4 = map(with_four_axes, (query, keys, values))
    output = attend_entries(rows, keys4, values4, counts, scale=scale, backend=backend)
    return output.reshape(*query.shape[:-1], values.shape[-1])


def attend_entries(
    query: Float[Tensor, "batch heads rows dim"],
    keys: Float[Tensor, "batch heads entries dim"],
    values: Float[Tensor, "batch heads entries dim_value"],
    counts: Int32[Tensor, "batch heads entries"] | None,
    *,
    queries: int = 1,
    scale: float | None = None,
    backend: AnyBackend = "auto",
) -> Float[Tensor, "batch heads rows dim_value"]:
    """Values averaged with weights `softmax(scale * query . key + log(count))`, in the dtype of `query`.

    Parameters
    ----------
    query : rows that share a KV head: the query heads of its group, times `queries` new tokens; row r belongs to new
        token r % queries.
    keys, values, counts : what is attended to; no counts means all 1.
    queries : how many of the entries, the last ones, are the new tokens themselves: each row sees the entries up to
        its own. With 1 every row sees all entries.
    scale : of the logits, 1 / sqrt(dim) by default.
    backend : as in `choose`.

    Notes
    -----
    Computed in float32 whatever the dtypes. Costs 2 * rows * entries * dim multiply-adds. The C++ and the Triton
    implementation read an entry once per 64 or 16 rows, and hold no memory that grows with rows * entries.
    """
    scale = scale_of(scale, query)
    output: Tensor = implementation("attend", backend, query, keys, values)(query, keys, values, counts, queries, scale)
    return output
