"""The arithmetic of quantization: codes, scales and zeros of groups of 32 numbers, and bytes of codes.

Defined by `kvcluster.reference.quantization`: `+ - * /` in float64 and rounding, ties to even: the same bits anywhere.
"""

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
from jaxtyping import BFloat16, Float, Float32, Int16, UInt8
from torch import Tensor

from ..scalars import check_integer

__all__ = [
    "GROUP",
    "check_bits",
    "check_bits_of_entries",
    "check_n_exact",
    "codes_of",
    "numbers_of",
    "padded_to_groups",
    "plain_bits",
    "within_range",
]

GROUP = 32  # numbers that share a scale
LARGEST_ZERO = 2**11 - 1  # steps from the numbers of a group to 0
PARTS = 16  # of a step, of which a zero is a whole number
MOST_COUNTED = 2**15 - 1  # tokens of a quantized entry, whose count has 16 bits
PLANES = {8: (8,), 4: (4,), 3: (2, 1), 2: (2,)}  # bits of a code that are packed together, the lowest first


def padded_to_groups(array: Float[Tensor, "*lead numbers"]) -> Float[Tensor, "*lead groups 32"]:
    """The last axis in groups of 32; the last of them is filled with its last number, which changes neither end."""
    missing = -array.shape[-1] % GROUP
    if missing:
        array = torch.cat([array, array[..., -1:].expand(*array.shape[:-1], missing)], dim=-1)
    return array.unflatten(-1, (-1, GROUP))


def codes_of(
    groups: Float[Tensor, "*lead groups 32"], bits: int, n_numbers: int
) -> tuple[UInt8[Tensor, "*lead groups bytes"], BFloat16[Tensor, "*lead groups"], Int16[Tensor, "*lead groups"]]:
    """Packed codes, scales and zeros of groups, of which only the first `n_numbers` of all numbers are there."""
    low, high = groups.amin(dim=-1).double(), groups.amax(dim=-1).double()
    top = 2**bits - 1
    scales = up_to_bfloat16(
        torch.maximum((high - low) / top, torch.maximum(low.abs(), high.abs()) / LARGEST_ZERO).float()
    )
    steps = scales.double()
    steps = torch.where(steps > 0, steps, torch.inf)  # divided by infinity all is 0
    zeros = -(PARTS * low / steps).round()
    codes = (groups.double() / steps.unsqueeze(-1)).add_(zeros.unsqueeze(-1) / PARTS).round_().to(torch.uint8)
    n_last = n_numbers % GROUP
    if n_last:
        codes[..., -1, n_last:] = 0
    return pack(codes, bits), scales, zeros.to(torch.int16)


def numbers_of(
    codes: UInt8[Tensor, "*lead bytes"], scales: BFloat16[Tensor, "*lead"], zeros: Int16[Tensor, "*lead"]
) -> Float32[Tensor, "*lead 32"]:
    """What is read back, `scale * (code - zero / 16)`: exact in float32."""
    return scales.float().unsqueeze(-1) * (unpack(codes) - zeros.float().unsqueeze(-1) / PARTS)


def up_to_bfloat16(array: Float32[Tensor, "*shape"]) -> BFloat16[Tensor, "*shape"]:
    """Numbers that are not negative, rounded up to bfloat16."""
    return ((array.view(torch.int32) + 0xFFFF) >> 16).to(torch.int16).view(torch.bfloat16)


def within_range(array: Float32[Tensor, "*shape"], dtype: torch.dtype) -> Float[Tensor, "*shape"]:
    """Rounded to `dtype`, where all are finite: what is read back can be half a step above the largest of float16."""
    largest = torch.finfo(torch.float16).max
    return array.clamp(-largest, largest).half() if dtype == torch.float16 else array.to(dtype)


def pack(codes: UInt8[Tensor, "*lead 32"], bits: int) -> UInt8[Tensor, "*lead bytes"]:
    """32 codes in `4 * bits` bytes, plane by plane; byte i of a plane of p bits holds the codes i, i + 4 p, ..."""
    planes, done = [], 0
    for width in PLANES[bits]:
        plane = ((codes >> done) & (2**width - 1)).unflatten(-1, (8 // width, 4 * width))
        packed = plane[..., 0, :]
        for place in range(1, 8 // width):
            packed = packed | plane[..., place, :] << place * width
        planes.append(packed)
        done += width
    return torch.cat(planes, dim=-1)


def unpack(packed: UInt8[Tensor, "*lead bytes"]) -> UInt8[Tensor, "*lead 32"]:
    """The inverse of `pack`."""
    codes, done = None, 0
    for width in PLANES[packed.shape[-1] * 8 // GROUP]:
        plane = packed[..., 4 * done : 4 * (done + width)]
        places = [(plane >> place * width) & (2**width - 1) for place in range(8 // width)]
        in_order = torch.cat(places, dim=-1) << done
        codes = in_order if codes is None else codes | in_order
        done += width
    assert codes is not None
    return codes


def check_bits(bits: int) -> int:
    """`bits` as Python's own int; refuse what is not a number of bits that codes can have."""
    if isinstance(bits, bool) or not isinstance(bits, Integral):
        raise TypeError(f"bits must be an integer, got {bits!r}")
    if bits not in PLANES:
        raise ValueError(f"bits must be 8, 4, 3 or 2, got {bits}")
    return int(bits)


def check_bits_of_entries(
    bits: int | tuple[int, int], *, chunk_size: int, whole_heads: Sequence[int] = ()
) -> tuple[int, int] | None:
    """The bits of keys and of values, None for 16: they stay as they are. Refuse all else, and what excludes it."""
    if not isinstance(bits, bool) and isinstance(bits, Integral) and bits == 16:
        return None
    pair: Any = (bits, bits) if isinstance(bits, Integral) else bits
    is_pair = not isinstance(pair, str) and isinstance(pair, Sequence) and len(pair) == 2
    if not is_pair or any(isinstance(x, bool) or not isinstance(x, Integral) for x in pair):
        raise TypeError(f"bits must be an integer, or one for keys and one for values, got {bits!r}")
    if not set(pair) <= set(PLANES):
        raise ValueError(f"bits must be 16, or 8, 4, 3 or 2 for both or for keys and values, got {bits}")
    check_integer("chunk_size", chunk_size, least=1)
    if chunk_size > MOST_COUNTED:
        raise ValueError(f"chunk_size must be at most {MOST_COUNTED} with bits below 16, got {chunk_size}")
    if len(whole_heads):
        raise ValueError(f"whole_heads must be empty with bits below 16, got {list(whole_heads)}")
    return int(pair[0]), int(pair[1])


def plain_bits(bits: int | tuple[int, int]) -> int | tuple[int, int]:
    """Bits that have been checked, as they were asked for, in Python's own integers."""
    return (int(bits[0]), int(bits[1])) if isinstance(bits, Sequence) else int(bits)


def check_n_exact(n_exact: int | None, *, bits: tuple[int, int] | None, chunk_size: int, n_recent: int) -> int | None:
    """`n_exact`; refuse a number of exact tokens that leaves none to quantize, or chunks of parts of groups."""
    if n_exact is None:
        return None
    n_exact = check_integer("n_exact", n_exact, least=0)
    check_integer("n_recent", n_recent, least=0)
    if bits is None:
        raise ValueError(f"n_exact must be None with 16 bits, where all is exact, got {n_exact}")
    if n_exact > n_recent:
        raise ValueError(f"n_exact must be at most n_recent, got {n_exact} > {n_recent}")
    if chunk_size % GROUP:
        raise ValueError(f"chunk_size must be a multiple of {GROUP} with n_exact, got {chunk_size}")
    return n_exact
