"""Attention in C++."""

import ctypes

import torch
from torch import Tensor

from ..exact.entries import Rest, attend_copies
from .compiling import library
from .layout import DTYPES

__all__ = ["attend", "attend_places"]


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
    batch, heads, rows, dim = query.shape
    scaled = (query.float() * scale).contiguous()
    keys, values = (x if x.stride(-1) == 1 else x.contiguous() for x in (keys, values))
    if counts is not None and counts.stride(-1) != 1:
        counts = counts.contiguous()
    output = torch.empty_like(scaled)
    strides = (*keys.stride()[:3], *values.stride()[:3], *(counts.stride()[:2] if counts is not None else (0, 0)))
    shape = (batch * heads, heads, rows, queries, keys.shape[2], dim, torch.get_num_threads(), *strides)
    getattr(library("attention"), f"kvcluster_attend_{DTYPES[keys.dtype]}")(
        (ctypes.c_int64 * len(shape))(*shape),
        *(ctypes.c_void_p(x.data_ptr()) for x in (scaled, keys, values)),
        ctypes.c_void_p(counts.data_ptr() if counts is not None else None),
        ctypes.c_void_p(output.data_ptr()),
    )
    return output.to(query.dtype)


def attend_places(
    query: Tensor, keys: Tensor, values: Tensor, places: Tensor, rest: Rest | None, scale: float
) -> Tensor:
    """As `kvcluster.fast.plain.attention.attend_places`."""
    return attend_copies(attend, query, keys, values, places, rest, scale)
