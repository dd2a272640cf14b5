"""Linear layers in C++."""

import ctypes

import torch
from torch import Tensor

from .compiling import library, pointers

__all__ = ["linear"]


def linear(rows: Tensor, weight: Tensor) -> Tensor:
    """`rows @ weight.T` (n, outputs), for few rows: float32, contiguous; inputs a multiple of LANES, outputs of 4."""
    output = rows.new_empty(len(rows), len(weight))
    sizes = (*rows.shape, len(weight), torch.get_num_threads())
    library("linear").kvcluster_linear(*pointers(weight, rows, output), *map(ctypes.c_int64, sizes))
    return output
