"""Numbers in few bits: 32 at a time they are rounded to multiples of a step of their own."""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, Int16, UInt8

from .arguments import check_array, check_half_range, check_integer

__all__ = [
    "GROUP",
    "Quantized",
    "check_bits_of_entries",
    "check_n_exact",
    "dequantize",
    "quantize",
    "read_back",
    "within_range",
]

GROUP = 32  # numbers that share a scale
LARGEST_ZERO = 2**11 - 1  # steps from the numbers of a group to 0
PARTS = 16  # of a step, of which a zero is a whole number
MOST_COUNTED = 2**15 - 1  # tokens of a quantized entry, whose count has 16 bits
PLANES = {8: (8,), 4: (4,), 3: (2, 1), 2: (2,)}  # bits of a code that are packed together, the lowest first


@dataclass(frozen=True, eq=False)
class Quantized:
    """Numbers `scale * (code - zero / 16)`, in groups of 32 along the last axis, the last of which may be shorter.

    Attributes
    ----------
    codes : (..., groups, 4 * bits), uint8: 32 codes of `bits` bits, see `pack`; 0 where there is no number.
    scales : (..., groups), float32, bfloat16 numbers, which is what they count as in `nbytes`.
    zeros : (..., groups), int16; in sixteenths of a step (docs/papers.md, Ours: entries in few bits).

    Examples
    --------
    >>> quantized = quantize(np.ones((2, 40), dtype=np.float16), bits=4)
    >>> quantized.bits, quantized.codes.shape, quantized.nbytes  # two groups in each of two rows
    (4, (2, 2, 16), 80)
    """

    codes: UInt8[np.ndarray, "*lead groups bytes"]
    scales: Float32[np.ndarray, "*lead groups"]
    zeros: Int16[np.ndarray, "*lead groups"]

    @property
    def bits(self) -> int:
        return self.codes.shape[-1] * 8 // GROUP

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.size * 2 + self.zeros.nbytes


def quantize(array: Float[np.ndarray, "*lead rows numbers"], *, bits: int) -> Quantized:
    """Numbers of `array` as codes of `bits` bits, 32 along the last axis with one scale and one zero.

    Parameters
    ----------
    array : (..., rows, numbers), at most half of the largest float32 number in size.
    bits : 8, 4, 3 or 2.

    Raises
    ------
    ValueError : wrong dtype or shape, NaN, infinity or larger numbers; another number of bits.

    Notes
    -----
    In float64, with `top = 2**bits - 1`, of each group:

    1. scale = the larger of `(max - min) / top` and `max(|min|, |max|) / 2047`, rounded to float32, then up to the
       next bfloat16; where that is 0, zero and codes are 0;
    2. zero = `-rint(16 * min / scale)`, ties to even: 0 lies so many sixteenths of a step above the code 0;
    3. code = `rint(x / scale + zero / 16)`, which is from 0 to `top`.

    A scale has 8 bits and `16 * code - zero` has 16, so what is read back is exact in float32, the same bits
    everywhere, and half a scale at most from what it was. Groups along the channel for keys, along the token for
    values, both of 32, are those of KIVI (docs/papers.md, Ours: entries in few bits); zeros in sixteenths are ours.

    Examples
    --------
    >>> quantized = quantize(np.array([[0.0, 1.0, 2.0, 3.0, 8.9]], dtype=np.float32), bits=2)
    >>> quantized.scales, quantized.zeros
    (array([[2.96875]], dtype=float32), array([[0]], dtype=int16))
    >>> dequantize(quantized, 5)
    array([[0.     , 0.     , 2.96875, 2.96875, 8.90625]], dtype=float32)
    """
    check_array("array", array)
    bits = check_bits(bits)
    check_half_range("array", array, "to be quantized")
    *lead, n_numbers = array.shape
    n_groups = -(-n_numbers // GROUP)
    groups = np.full((*lead, n_groups * GROUP), np.nan)  # where there is no number
    groups[..., :n_numbers] = array
    groups = groups.reshape(*lead, n_groups, GROUP)
    low, high = np.nanmin(groups, axis=-1), np.nanmax(groups, axis=-1)  # (..., groups)
    top = 2**bits - 1
    scales = up_to_bfloat16(
        np.maximum((high - low) / top, np.maximum(np.abs(low), np.abs(high)) / LARGEST_ZERO).astype(np.float32)
    )
    steps = np.where(scales > 0, scales, np.inf).astype(np.float64)  # divided by infinity all is 0
    zeros = -np.rint(PARTS * low / steps)
    codes = np.rint(groups / steps[..., None] + zeros[..., None] / PARTS)
    return Quantized(pack(np.nan_to_num(codes).astype(np.uint8), bits), scales, zeros.astype(np.int16))


def dequantize(quantized: Quantized, n_numbers: int) -> Float32[np.ndarray, "*lead rows numbers"]:
    """The first `n_numbers` numbers, read back in float32 without rounding (docs/papers.md, Ours: entries in few bits).

    Examples
    --------
    >>> dequantize(quantize(np.array([[1.0, 2.0, 2.9]], dtype=np.float32), bits=8), 3)
    array([[1.0000229, 2.001915 , 2.8991318]], dtype=float32)
    """
    steps = unpack(quantized.codes, quantized.bits) - quantized.zeros[..., None].astype(np.float32) / PARTS
    numbers = quantized.scales[..., None] * steps  # (..., groups, 32)
    return numbers.reshape(*numbers.shape[:-2], numbers.shape[-2] * GROUP)[..., :n_numbers]


def read_back(
    keys: Float[np.ndarray, "*lead entries dim"],
    values: Float[np.ndarray, "*lead entries dim_value"],
    bits: tuple[int, int],
) -> tuple[Float32[np.ndarray, "*lead entries dim"], Float32[np.ndarray, "*lead entries dim_value"], int]:
    """Keys and values as they are after their quantization, and the bytes that they take.

    Keys share scales channel by channel, over 32 entries, because a few channels are large in all of them; values share
    them entry by entry, over 32 features. `entries` is a multiple of 32.
    """
    of_channels = quantize(keys.swapaxes(-1, -2), bits=bits[0])
    of_entries = quantize(values, bits=bits[1])
    keys = dequantize(of_channels, keys.shape[-2]).swapaxes(-1, -2)
    return keys, dequantize(of_entries, values.shape[-1]), of_channels.nbytes + of_entries.nbytes


def within_range(array: Float32[np.ndarray, "*shape"], dtype: np.dtype) -> Float[np.ndarray, "*shape"]:
    """Rounded to `dtype`, where all are finite: what is read back can be half a step above the largest of float16."""
    largest = np.finfo(np.float16 if dtype == np.float16 else np.float32).max
    return np.clip(array, -largest, largest).astype(dtype)


def up_to_bfloat16(array: Float32[np.ndarray, "*shape"]) -> Float32[np.ndarray, "*shape"]:
    """Numbers that are not negative, rounded up to bfloat16.

    >>> up_to_bfloat16(np.array([0.0, 1.0, 1.001], dtype=np.float32))
    array([0.       , 1.       , 1.0078125], dtype=float32)
    """
    return ((array.view(np.uint32) + np.uint32(0xFFFF)) & np.uint32(0xFFFF0000)).view(np.float32)


def pack(codes: UInt8[np.ndarray, "*groups 32"], bits: int) -> UInt8[np.ndarray, "*groups bytes"]:
    """32 codes in `4 * bits` bytes.

    Codes of 8, 4 and 2 bits are one plane; those of 3 bits are two, their 2 low bits and then their high bit. A plane
    of p bits is 4 p bytes: byte i holds, from its low bits on, the codes i, i + 4 p, i + 8 p, ...

    >>> pack(np.arange(32, dtype=np.uint8) % 16, 4)
    array([  0,  17,  34,  51,  68,  85, 102, 119, 136, 153, 170, 187, 204,
           221, 238, 255], dtype=uint8)
    """
    planes = []
    for width in PLANES[bits]:
        plane = (codes & np.uint8(2**width - 1)).reshape(*codes.shape[:-1], 8 // width, 4 * width)
        places = np.arange(0, 8, width, dtype=np.uint8)[:, None]  # of the first bit
        planes.append(np.bitwise_or.reduce(plane << places, axis=-2))
        codes = codes >> np.uint8(width)
    return np.concatenate(planes, axis=-1)


def unpack(packed: UInt8[np.ndarray, "*groups bytes"], bits: int) -> UInt8[np.ndarray, "*groups 32"]:
    """The inverse of `pack`.

    >>> codes = np.arange(32, dtype=np.uint8) % 8
    >>> np.array_equal(unpack(pack(codes, 3), 3), codes)
    True
    """
    codes, done = np.zeros((*packed.shape[:-1], GROUP), dtype=np.uint8), 0
    for width in PLANES[bits]:
        plane = packed[..., 4 * done : 4 * (done + width)]
        places = np.arange(0, 8, width, dtype=np.uint8)[:, None]
        in_order = (plane[..., None, :] >> places) & np.uint8(2**width - 1)
        codes |= in_order.reshape(codes.shape) << np.uint8(done)
        done += width
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
