"""Full attention on torch tensors."""

import torch
from jaxtyping import Float, Int32
from torch import Tensor

from .arguments import check_attention, check_counts, check_shape, with_four_axes
from .backends import AnyBackend, cell, implementation
from .scalars import scale_of

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
    return attend_any(query, keys, values, None, scale, backend, has_counts=False)


def attend_any(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    counts: Tensor | None,
    scale: float | None,
    backend: AnyBackend,
    *,
    has_counts: bool,
) -> Tensor:
    """`attend_entries` of tensors with any leading axes, which are checked.

    NaN and infinities are looked for only where a product or the output is not finite. If there are none, it was
    float32 that was too small, and float64 gives the answer.
    """
    try:
        check_attention(query, keys, values, look=check_shape)
        if has_counts:
            counts = check_counts(keys, counts)
            counts = with_four_axes(counts.to(torch.int32).unsqueeze(-1)).squeeze(-1)
        scale = scale_of(scale, query)
        rows, keys4, values4 = map(with_four_axes, (query, keys, values))
        attend = implementation("attend_checked", backend, rows, keys4, values4)
        output, is_finite = attend(rows, keys4, values4, counts, 1, scale)
    except Exception:
        check_attention(query, keys, values)  # of several faults the first is named
        raise
    if not is_finite or not output.numel():
        check_attention(query, keys, values)
        output = cell("attend_in_float64", "torch")(rows, keys4, values4, counts, 1, scale)
    attended: Tensor = output.reshape(*query.shape[:-1], values.shape[-1])
    return attended


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
