"""The scores of distinctive matching in C++."""

import ctypes

import torch
from torch import Tensor

from . import DTYPES
from .compiling import library

__all__ = ["likeness_to_mean"]


def likeness_to_mean(tokens: Tensor) -> Tensor:
    """Canonical similarity of tokens (problems, size, dim) to the centroid of their problem, (problems, size) float64.

    dim must be a multiple of LANES. Copied where features do not lie side by side.
    """
    problems, size, dim = tokens.shape
    tokens = tokens if tokens.stride(-1) == 1 else tokens.contiguous()
    result = torch.empty(problems, size, dtype=torch.float64)
    shape = (problems, size, dim, torch.get_num_threads(), *tokens.stride()[:2])
    getattr(library("distinctive"), f"kvcluster_likeness_{DTYPES[tokens.dtype]}")(
        (ctypes.c_int64 * len(shape))(*shape),
        ctypes.c_void_p(tokens.data_ptr()),
        ctypes.c_void_p(result.data_ptr()),
    )
    return result
