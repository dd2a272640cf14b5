"""Attention of query rows to the entries of a cache: the one computation behind every attention of this package.

Three implementations: C++ for the CPU, Triton kernels for CUDA, plain torch for all else. The first two read every key
and value once for all query heads that share them.
"""

import torch
from jaxtyping import Float, Float32, Int32, Int64
from torch import Tensor

from . import cpu
from .backends import AttentionBackend, choose_attention_backend

__all__ = ["Rest", "attend_entries", "attend_places", "entries_at", "log_counts", "rows_of"]

# Centroids of keys and of values, and how many tokens each stands for.
Rest = tuple[
    Float32[Tensor, "problems clusters dim"],
    Float32[Tensor, "problems clusters dim_value"],
    Int32[Tensor, "problems clusters"],
]
WORKING_BYTES = 64 * 2**20  # of logits that the torch implementation holds at once


def attend_entries(
    query: Float[Tensor, "batch heads rows dim"],
    keys: Float[Tensor, "batch heads entries dim"],
    values: Float[Tensor, "batch heads entries dim_value"],
    counts: Int32[Tensor, "batch heads entries"] | None,
    *,
    queries: int = 1,
    scale: float | None = None,
    backend: AttentionBackend = "auto",
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
    backend : as in `choose_attention_backend`.

    Notes
    -----
    Computed in float32 whatever the dtypes. Costs 2 * rows * entries * dim multiply-adds. The C++ and the Triton
    implementation read an entry once per 64 or 16 rows, and hold no memory that grows with rows * entries.
    """
    chosen = choose_attention_backend(backend, query, keys, values)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if chosen == "torch":
        return attend_by_torch(query, keys, values, counts, queries, scale)
    if chosen == "cpp":
        return cpu.attend(query, keys, values, counts, queries, scale)
    from .kernels.attention import attend

    return attend(query, keys, values, counts, queries, scale).to(query.dtype)


def attend_places(
    query: Float[Tensor, "problems rows dim"],
    keys: Float[Tensor, "problems tokens dim"],
    values: Float[Tensor, "problems tokens dim_value"],
    places: Int64[Tensor, "problems entries"],
    rest: Rest | None = None,
    *,
    scale: float | None = None,
    backend: AttentionBackend = "auto",
) -> Float[Tensor, "problems rows dim_value"]:
    """`attend_entries` to `entries_at(keys, values, places, rest)`.

    Without `rest` the Triton implementation reads them where they lie. The others make a copy.
    """
    chosen = choose_attention_backend(backend, query, keys, values)
    if chosen == "triton" and rest is None:
        from .kernels.attention import attend

        scale = query.shape[-1] ** -0.5 if scale is None else scale
        on_heads = (query.unsqueeze(0), keys.unsqueeze(0), values.unsqueeze(0))
        return attend(*on_heads, None, 1, scale, places=places)[0].to(query.dtype)
    arrays = (query, *entries_at(keys, values, places, rest))
    return attend_entries(*(array.unsqueeze(0) for array in arrays), scale=scale, backend=chosen)[0]


def entries_at(keys: Tensor, values: Tensor, places: Tensor, rest: Rest | None) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values and counts of the tokens `places`, count 0 where that is -1; then those that stand for the rest."""
    keys, values = (rows_of(array, places.clamp(min=0)) for array in (keys, values))
    counts = (places >= 0).int()
    if rest is None:
        return keys, values, counts
    pairs = zip((keys.float(), values.float(), counts), rest, strict=True)
    keys, values, counts = (torch.cat(pair, dim=1) for pair in pairs)
    return keys, values, counts


def rows_of(array: Float[Tensor, "problems rows dim"], places: Int64[Tensor, "problems chosen"]) -> Tensor:
    """The chosen rows, (problems, chosen, dim): one copy of each."""
    flat = array.reshape(-1, array.shape[-1])
    index = places + torch.arange(len(array), device=places.device)[:, None] * array.shape[1]
    return flat.index_select(0, index.flatten()).view(*places.shape, array.shape[-1])


def attend_by_torch(
    query: Tensor, keys: Tensor, values: Tensor, counts: Tensor | None, queries: int, scale: float
) -> Tensor:
    """The formula as it is written, for as many rows at once as fit the working memory."""
    *lead, rows, _ = query.shape
    entries = keys.shape[-2]
    together = max(1, WORKING_BYTES // max(1, 4 * entries * torch.Size(lead).numel()))
    token = torch.arange(rows, device=query.device) % queries
    visible = entries - queries + 1 + token  # entries that each row sees
    column = torch.arange(entries, device=query.device)
    outputs = []
    with torch.autocast(query.device.type, enabled=False):
        keys32, values32 = keys.float(), values.float()
        bias = None if counts is None else log_counts(counts).unsqueeze(-2)  # (batch, heads, 1, entries)
        for first in range(0, max(1, rows), together):
            block = slice(first, first + together)
            logits = scale * (query[..., block, :].float() @ keys32.mT)  # (batch, heads, rows, entries)
            if bias is not None:
                logits = logits + bias
            if queries > 1:
                logits = logits.masked_fill(column >= visible[block, None], -torch.inf)
            outputs.append(logits.softmax(dim=-1) @ values32)  # (batch, heads, rows, dim_value)
    return torch.cat(outputs, dim=-2).to(query.dtype)


def log_counts(counts: Tensor) -> Tensor:
    """Natural logarithm of the counts in float32, minus infinity where a count is 0."""
    return counts.double().log().float()
