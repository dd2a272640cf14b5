"""Attention in C++."""

import ctypes

import torch
from torch import Tensor

from ..exact.entries import Rest, attend_copies
from .compiling import library, pointers
from .layout import DTYPES

__all__ = ["attend", "attend_checked", "attend_places", "attend_ragged"]


def attend(query: Tensor, keys: Tensor, values: Tensor, counts: Tensor | None, queries: int, scale: float) -> Tensor:
    """Attention output (batch, heads, rows, dim), in the dtype of `query`.

    Parameters
    ----------
    query : (batch, heads, rows, dim); row r belongs to new token r % queries.
    keys, values : (batch, heads, entries, dim), of one dtype; dim a multiple of LANES. Copied where features or
        entries do not lie side by side.
    counts : (batch, heads, entries), int32; None where every count is 1.
    queries : how many of the entries, the last ones, are the new tokens; each row sees the entries up to its own.
    """
    return attend_checked(query, keys, values, counts, queries, scale)[0]


def attend_checked(
    query: Tensor, keys: Tensor, values: Tensor, counts: Tensor | None, queries: int, scale: float
) -> tuple[Tensor, bool]:
    """`attend`, and whether all on the way is finite, as in `kvcluster.fast.plain.attention.attend_checked`."""
    keys, values = (x if x.stride(-1) == 1 else x.contiguous() for x in (keys, values))
    if counts is not None and counts.stride(-1) != 1:
        counts = counts.contiguous()
    key_batch, key_head, key_entry = keys.stride()[:3]
    value_batch, value_head, value_entry = values.stride()[:3]
    count_batch, count_head = (0, 0) if counts is None else counts.stride()[:2]
    entries = keys.shape[2]
    heads = [(entries, h * key_head, h * value_head, h * count_head) for h in range(query.shape[1])]
    strides = (key_batch, key_entry, value_batch, value_entry, count_batch)
    return attend_heads(query, keys, values, counts, heads, strides, queries, scale)


def attend_ragged(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    counts: Tensor,
    lengths: tuple[int, ...],
    firsts: tuple[int, ...],
    queries: int,
    scale: float,
) -> Tensor:
    """As `kvcluster.fast.plain.attention.attend_ragged`, read where the entries lie, in one call for all heads."""
    keys, values = (x if x.stride(-1) == 1 else x.contiguous() for x in (keys, values))
    counts = counts if counts.stride(-1) == 1 else counts.contiguous()
    (key_batch, key_entry), (value_batch, value_entry) = keys.stride()[:2], values.stride()[:2]
    heads = [(n, first * key_entry, first * value_entry, first) for n, first in zip(lengths, firsts, strict=True)]
    strides = (key_batch, key_entry, value_batch, value_entry, counts.stride(0))
    return attend_heads(query, keys, values, counts, heads, strides, queries, scale)[0]


def attend_heads(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    counts: Tensor | None,
    heads: list[tuple[int, int, int, int]],
    strides: tuple[int, ...],
    queries: int,
    scale: float,
) -> tuple[Tensor, bool]:
    """The call of C++: `heads` are entries and places of keys, values and counts, `strides` those of `Shape`."""
    batch, kv_heads, rows, dim = query.shape
    scaled = (query.float() * scale).contiguous()
    output = torch.empty_like(scaled)
    shape = (batch * kv_heads, kv_heads, rows, queries, dim, torch.get_num_threads(), *strides)
    places = [number for head in heads for number in head]
    is_finite = getattr(library("attention"), f"kvcluster_attend_{DTYPES[keys.dtype]}")(
        *((ctypes.c_int64 * len(numbers))(*numbers) for numbers in (shape, places)),
        *pointers(scaled, keys, values, counts, output),
    )
    return output.to(query.dtype), bool(is_finite)


def attend_places(
    query: Tensor, keys: Tensor, values: Tensor, places: Tensor, rest: Rest | None, scale: float
) -> Tensor:
    """As `kvcluster.fast.plain.attention.attend_places`."""
    return attend_copies(attend, query, keys, values, places, rest, scale)
