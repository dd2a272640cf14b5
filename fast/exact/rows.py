"""Rows of bytes: what the features of one token are in few bits, and back.

A row is the codes of all groups of 32 features, then their scales, then their zeros.
"""

import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor

from .quantization import GROUP, codes_of, numbers_of, padded_to_groups

__all__ = ["nbytes_of_row", "pack_rows", "unpack_rows"]


def nbytes_of_row(n_numbers: int, bits: int) -> int:
    """Bytes of a row of `n_numbers` features."""
    return -(-n_numbers // GROUP) * 4 * (bits + 1)


def pack_rows(array: Float[Tensor, "*lead numbers"], bits: int) -> UInt8[Tensor, "*lead nbytes"]:
    """Each row of `array` quantized, as by `kvcluster.reference.quantize`."""
    codes, scales, zeros = codes_of(padded_to_groups(array), bits, array.shape[-1])
    parts = codes.flatten(-2), scales.contiguous().view(torch.uint8), zeros.contiguous().view(torch.uint8)
    return torch.cat(parts, dim=-1)


def unpack_rows(rows: UInt8[Tensor, "*lead nbytes"], n_numbers: int) -> Float32[Tensor, "*lead numbers"]:
    """What rows of `n_numbers` features are read back as."""
    groups = -(-n_numbers // GROUP)
    n_codes = rows.shape[-1] - 4 * groups
    codes = rows[..., :n_codes].unflatten(-1, (groups, n_codes // groups))
    parts = rows[..., n_codes:].contiguous()
    scales, zeros = parts[..., : 2 * groups].contiguous(), parts[..., 2 * groups :].contiguous()
    numbers = numbers_of(codes, scales.view(torch.bfloat16), zeros.view(torch.int16))
    return numbers.flatten(-2)[..., :n_numbers]
