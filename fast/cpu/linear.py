"""Linear layers in C++."""

import ctypes

import torch
from torch import Tensor

from .compiling import library

__all__ = ["linear"]


def linear(rows: Tensor, weight: Tensor) -> Tensor:
    """`rows @ weight.T` (n, outputs), for few rows: float32, contiguous; inputs a multiple of LANES, outputs of 4."""
    output = rows.new_empty(len(rows), len(weight))
    pointers = (ctypes.c_void_p(x.data_ptr()) for x in (weight, rows, output))
    sizes = (*rows.shape, len(weight), torch.get_num_threads())
    library("linear").kvcluster_linear(*pointers, *map(ctypes.c_int64, sizes))
    return output
