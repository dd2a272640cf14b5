"""Rows of bytes, what the features of one token are in few bits, in C++."""

import torch
from torch import Tensor

from ..exact.quantization import GROUP
from ..exact.rows import nbytes_of_row
from .compiling import call
from .layout import DTYPES

__all__ = ["pack_rows", "unpack_rows"]


def pack_rows(array: Tensor, bits: int) -> Tensor:
    """As `kvcluster.fast.exact.rows.pack_rows`."""
    dim = array.shape[-1]
    rows = array.new_empty(*array.shape[:-1], nbytes_of_row(dim, bits), dtype=torch.uint8)
    groups = -(-dim // GROUP)
    shape = array.shape[:-1].numel(), dim, groups, bits, rows.shape[-1], torch.get_num_threads()
    call("rows", f"pack_rows_{DTYPES[array.dtype]}", shape, array.contiguous(), rows)
    return rows


def unpack_rows(rows: Tensor, n_numbers: int) -> Tensor:
    """As `kvcluster.fast.exact.rows.unpack_rows`."""
    array = rows.new_empty(*rows.shape[:-1], n_numbers, dtype=torch.float32)
    groups = -(-n_numbers // GROUP)
    bits = rows.shape[-1] // (4 * groups) - 1
    shape = rows.shape[:-1].numel(), n_numbers, groups, bits, rows.shape[-1], torch.get_num_threads()
    call("rows", "unpack_rows", shape, rows.contiguous(), array)
    return array
