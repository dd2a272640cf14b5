"""The parts of decoding that C++ does on a CPU; `compiling` says how it comes to be compiled."""

import ctypes

import torch
from torch import Tensor

from .compiling import compiler, library

__all__ = ["DTYPES", "LANES", "attend", "compiler", "library", "linear"]

DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
LANES = 16  # dim must be a multiple of it


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


def linear(rows: Tensor, weight: Tensor) -> Tensor:
    """`rows @ weight.T` (n, outputs), for few rows: float32, contiguous; inputs a multiple of LANES, outputs of 4."""
    output = rows.new_empty(len(rows), len(weight))
    pointers = (ctypes.c_void_p(x.data_ptr()) for x in (weight, rows, output))
    sizes = (*rows.shape, len(weight), torch.get_num_threads())
    library("linear").kvcluster_linear(*pointers, *map(ctypes.c_int64, sizes))
    return output
