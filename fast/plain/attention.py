"""Attention of query rows to the entries of a cache: the formula as it is written."""

import math

import torch
from jaxtyping import Float, Int32, Int64
from torch import Tensor

from ..exact.blocks import Packed
from ..exact.entries import Reached, Rest, attend_copies, log_counts, places_of

__all__ = [
    "attend",
    "attend_checked",
    "attend_in_float64",
    "attend_packed",
    "attend_places",
    "attend_ragged",
    "attend_recalled",
]

WORKING_BYTES = 64 * 2**20  # of logits that are held at once


def attend(query: Tensor, keys: Tensor, values: Tensor, counts: Tensor | None, queries: int, scale: float) -> Tensor:
    """Output (batch, heads, rows, dim_value), for as many rows at once as fit the working memory."""
    return attend_in(torch.float32, query, keys, values, counts, queries, scale)[0]


def attend_checked(
    query: Tensor, keys: Tensor, values: Tensor, counts: Tensor | None, queries: int, scale: float
) -> tuple[Tensor, bool]:
    """`attend`, and whether all products of query and key and the output are finite: then so is all that was read."""
    output, lowest = attend_in(torch.float32, query, keys, values, counts, queries, scale, is_checked=True)
    # A product of infinity or NaN leaves no output finite, only one of minus infinity has no weight.
    return output, all(math.isfinite(number) for number in lowest) and bool(output.detach().isfinite().all())


def attend_in_float64(
    query: Tensor, keys: Tensor, values: Tensor, counts: Tensor | None, queries: int, scale: float
) -> Tensor:
    """`attend` of numbers whose products or sums float32 cannot hold."""
    return attend_in(torch.float64, query, keys, values, counts, queries, scale)[0]


def attend_in(
    dtype: torch.dtype,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    counts: Tensor | None,
    queries: int,
    scale: float,
    *,
    is_checked: bool = False,
) -> tuple[Tensor, list[Tensor]]:
    """Output of `attend`, computed in `dtype`, and with `is_checked` the lowest product in each block of rows."""
    *lead, rows, _ = query.shape
    entries = keys.shape[-2]
    together = max(1, WORKING_BYTES // max(1, 4 * entries * torch.Size(lead).numel()))
    token = torch.arange(rows, device=query.device) % queries
    visible = entries - queries + 1 + token  # entries that each row sees
    column = torch.arange(entries, device=query.device)
    outputs, lowest = [], []
    with torch.autocast(query.device.type, enabled=False):
        wide_keys, wide_values = keys.to(dtype), values.to(dtype)
        bias = None if counts is None else log_counts(counts).unsqueeze(-2)  # (batch, heads, 1, entries)
        for first in range(0, max(1, rows), together):
            block = slice(first, first + together)
            logits = scale * (query[..., block, :].to(dtype) @ wide_keys.mT)  # (batch, heads, rows, entries)
            if is_checked and logits.numel():
                lowest.append(logits.detach().amin())
            if bias is not None:
                logits = logits + bias
            if queries > 1:
                logits = logits.masked_fill(column >= visible[block, None], -torch.inf)
            outputs.append(logits.softmax(dim=-1) @ wide_values)  # (batch, heads, rows, dim_value)
    return torch.cat(outputs, dim=-2).to(query.dtype), lowest


def attend_ragged(
    query: Float[Tensor, "batch heads rows dim"],
    keys: Float[Tensor, "batch places dim"],
    values: Float[Tensor, "batch places dim_value"],
    counts: Int32[Tensor, "batch places"],
    lengths: tuple[int, ...],
    firsts: tuple[int, ...],
    queries: int,
    scale: float,
) -> Float[Tensor, "batch heads rows dim_value"]:
    """Output of heads that have each their own number of entries, `lengths`, from their place `firsts` on."""
    spans = [slice(first, first + n) for n, first in zip(lengths, firsts, strict=True)]
    return attend_heads(query, [(keys[:, span], values[:, span], counts[:, span]) for span in spans], queries, scale)


def attend_heads(query: Tensor, heads: list[tuple[Tensor, Tensor, Tensor]], queries: int, scale: float) -> Tensor:
    """Output of each head of `query` to its own keys and values (batch, entries, .) and counts."""
    outputs = []
    for head, entries in enumerate(heads):
        key, value, count = (x[:, None] for x in entries)
        outputs.append(attend(query[:, head : head + 1], key, value, count, queries, scale))
    return torch.cat(outputs, dim=1)


def attend_packed(
    query: Float[Tensor, "batch heads rows dim"],
    keys: Float[Tensor, "batch places dim"],
    values: Float[Tensor, "batch places dim_value"],
    counts: Int32[Tensor, "batch places"],
    lengths: tuple[int, ...],
    firsts: tuple[int, ...],
    packed: Packed,
    queries: int,
    scale: float,
) -> Float[Tensor, "batch heads rows dim_value"]:
    """As `attend_ragged`, and to the entries of the blocks `packed`, which are read back for it."""
    heads = []
    for head, (n, first) in enumerate(zip(lengths, firsts, strict=True)):
        exact = (x[:, first : first + n] for x in (keys, values, counts))
        pairs = zip(packed.of_head(head), exact, strict=True)  # the new tokens are the last
        key, value, count = (torch.cat([read, other.to(read.dtype)], dim=1) for read, other in pairs)
        heads.append((key, value, count))
    return attend_heads(query, heads, queries, scale)


def attend_places(
    query: Float[Tensor, "problems rows dim"],
    keys: Float[Tensor, "problems tokens dim"],
    values: Float[Tensor, "problems tokens dim_value"],
    places: Int64[Tensor, "problems entries"],
    rest: Rest | None,
    scale: float,
) -> Float[Tensor, "problems rows dim_value"]:
    """Attention to the tokens `places`, none where that is -1, and to what stands for the rest."""
    return attend_copies(attend, query, keys, values, places, rest, scale)


def attend_recalled(
    query: Float[Tensor, "problems group dim"],
    reached: Reached,
    taken: Int64[Tensor, "problems clusters"] | None,
    n_recalled: int,
    rest: Rest | None,
    scale: float,
) -> Float[Tensor, "problems group dim_value"]:
    """Attention to the exact tokens of `reached`, to the `n_recalled` tokens `taken` of its clusters, to the rest."""
    return attend_places(query, reached.keys, reached.values, places_of(reached, taken, n_recalled), rest, scale)
