"""The margins of attended matching in C++."""

import ctypes

import torch
from torch import Tensor

from .compiling import library, pointers
from .layout import DTYPES

__all__ = ["attention_margins"]


def attention_margins(keys: Tensor, queries: Tensor) -> Tensor:
    """As `kvcluster.fast.plain.attended_matching.attention_margins`; dim must be a multiple of LANES.

    Keys are copied where features do not lie side by side.
    """
    chunks, size, dim = keys.shape
    keys = keys if keys.stride(-1) == 1 else keys.contiguous()
    queries = queries.to(keys.dtype).resolve_neg().contiguous()
    margins = keys.new_empty(chunks, size, dtype=torch.float64)
    shape = (chunks, size, dim, queries.shape[1], torch.get_num_threads(), *keys.stride()[:2])
    getattr(library("attended"), f"kvcluster_margins_{DTYPES[keys.dtype]}")(
        (ctypes.c_int64 * len(shape))(*shape), *pointers(keys, queries, margins)
    )
    return margins
