"""What goes wrong when numbers become codes: in which groups, by which scale, how rounded, how packed."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from kvcluster.reference.quantization import GROUP, LARGEST_ZERO, PARTS, PLANES, Quantized, up_to_bfloat16
from kvcluster.reference.quantization import pack as right_pack

from .mistake import Mistake

__all__ = ["OF_NUMBERS", "OF_RESULTS", "PACKING", "Quantizing", "Wrong"]


class Wrong(NamedTuple):
    """A cause, the paragraph of SPECIFICATION.md, and a function in the place of the right one."""

    cause: str
    rule: str
    function: Callable[..., Quantized]


class Quantizing:
    """Right quantization in pieces; a mistake is a subclass with another one."""

    def __call__(self, array: np.ndarray, *, bits: int) -> Quantized:
        top = 2**bits - 1
        with np.errstate(all="ignore"):
            groups = self.groups(array)  # (..., groups, 32)
            low, high = self.ends(groups)
            scales = self.scales(low, high, top)
            steps = np.where(scales > 0, scales, np.inf).astype(np.float64)
            zeros = self.zeros(low, steps)
            codes = self.codes(groups, low[..., None], steps[..., None], zeros[..., None], top)
            whole = np.nan_to_num(codes).astype(np.int64).astype(np.uint8)
            return Quantized(right_pack(whole, bits), scales, self.stored(zeros))

    def groups(self, array: np.ndarray) -> np.ndarray:
        """NaN where there is no number."""
        missing = -array.shape[-1] % GROUP
        filled = np.pad(array.astype(np.float64), [(0, 0)] * (array.ndim - 1) + [(0, missing)], constant_values=np.nan)
        return filled.reshape(*array.shape[:-1], filled.shape[-1] // GROUP, GROUP)

    def ends(self, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.nanmin(groups, axis=-1), np.nanmax(groups, axis=-1)

    def scales(self, low: np.ndarray, high: np.ndarray, top: int) -> np.ndarray:
        return self.rounded_up(np.maximum((high - low) / top, np.maximum(abs(low), abs(high)) / LARGEST_ZERO))

    def rounded_up(self, least: np.ndarray) -> np.ndarray:
        return up_to_bfloat16(least.astype(np.float32))

    def zeros(self, low: np.ndarray, steps: np.ndarray) -> np.ndarray:
        return -self.whole(PARTS * low / steps)

    def stored(self, zeros: np.ndarray) -> np.ndarray:
        return zeros.astype(np.int64).astype(np.int16)

    def codes(self, groups: np.ndarray, low: np.ndarray, steps: np.ndarray, zeros: np.ndarray, top: int) -> np.ndarray:
        return self.whole(groups / steps + zeros / PARTS)

    def whole(self, numbers: np.ndarray) -> np.ndarray:
        return np.rint(numbers)


class HalfUp(Quantizing):
    def whole(self, numbers: np.ndarray) -> np.ndarray:
        return np.floor(numbers + 0.5)


class Down(Quantizing):
    def whole(self, numbers: np.ndarray) -> np.ndarray:
        return np.floor(numbers)


class OfRow(Quantizing):
    def ends(self, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        low, high = super().ends(groups)
        of_row = low.min(axis=-1, keepdims=True), high.max(axis=-1, keepdims=True)
        return np.broadcast_to(of_row[0], low.shape), np.broadcast_to(of_row[1], high.shape)


class WithZero(Quantizing):
    def ends(self, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        low, high = super().ends(groups)
        return np.minimum(low, 0), np.maximum(high, 0)


class OfColumns(Quantizing):
    def groups(self, array: np.ndarray) -> np.ndarray:
        return super().groups(array.swapaxes(-1, -2))


class FilledWithZeros(Quantizing):
    def groups(self, array: np.ndarray) -> np.ndarray:
        return np.nan_to_num(super().groups(array))


class FilledWithTheLast(Quantizing):
    def groups(self, array: np.ndarray) -> np.ndarray:
        groups = super().groups(array)
        return np.where(np.isnan(groups), array[..., -1:, None].astype(np.float64), groups)


class Signed(Quantizing):
    def scales(self, low: np.ndarray, high: np.ndarray, top: int) -> np.ndarray:
        return self.rounded_up(np.maximum(abs(low), abs(high)) / (top // 2))

    def zeros(self, low: np.ndarray, steps: np.ndarray) -> np.ndarray:
        return np.zeros(low.shape)

    def codes(self, groups: np.ndarray, low: np.ndarray, steps: np.ndarray, zeros: np.ndarray, top: int) -> np.ndarray:
        return np.clip(self.whole(groups / steps), -(top // 2) - 1, top // 2) % (top + 1)


class NotRounded(Quantizing):
    def zeros(self, low: np.ndarray, steps: np.ndarray) -> np.ndarray:
        return -PARTS * low / steps

    def stored(self, zeros: np.ndarray) -> np.ndarray:
        return zeros.astype(np.float32)

    def codes(self, groups: np.ndarray, low: np.ndarray, steps: np.ndarray, zeros: np.ndarray, top: int) -> np.ndarray:
        return self.whole((groups - low) / steps)


class FromTheSmallest(Quantizing):
    def codes(self, groups: np.ndarray, low: np.ndarray, steps: np.ndarray, zeros: np.ndarray, top: int) -> np.ndarray:
        return self.whole((groups - low) / steps)


class WholeSteps(Quantizing):
    def zeros(self, low: np.ndarray, steps: np.ndarray) -> np.ndarray:
        return -PARTS * self.whole(low / steps)


class RoundedApart(Quantizing):
    def codes(self, groups: np.ndarray, low: np.ndarray, steps: np.ndarray, zeros: np.ndarray, top: int) -> np.ndarray:
        return np.clip(self.whole(groups / steps) + self.whole(zeros / PARTS), 0, top)


class WithoutLimit(Quantizing):
    def scales(self, low: np.ndarray, high: np.ndarray, top: int) -> np.ndarray:
        return self.rounded_up((high - low) / top)


class InFloat32(Quantizing):
    def ends(self, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        low, high = super().ends(groups)
        return low.astype(np.float32), high.astype(np.float32)


class OneOfZeros(Quantizing):
    def rounded_up(self, least: np.ndarray) -> np.ndarray:
        scales = super().rounded_up(least)
        return np.where(scales == 0, np.float32(1), scales)


class AtOnce(Quantizing):
    def rounded_up(self, least: np.ndarray) -> np.ndarray:
        rounded = least.astype(np.float32)
        return up_to_bfloat16(np.where(rounded < least, np.nextafter(rounded, np.float32(np.inf)), rounded))


class ToNearest(Quantizing):
    def rounded_up(self, least: np.ndarray) -> np.ndarray:
        bits = least.astype(np.float32).view(np.uint32)
        nearest = bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))
        return (nearest & np.uint32(0xFFFF0000)).view(np.float32)


class InFull(Quantizing):
    def rounded_up(self, least: np.ndarray) -> np.ndarray:
        return least.astype(np.float32)


def packed_by(order: Callable[[int], np.ndarray]) -> Callable[..., np.ndarray]:
    """`pack` with the codes of a plane in another order, a function of the bits of its codes."""

    def pack(codes: np.ndarray, bits: int) -> np.ndarray:
        moved, done = np.zeros_like(codes), 0
        for width in PLANES[bits]:
            plane = codes >> np.uint8(done) & np.uint8(2**width - 1)
            moved |= plane[..., order(width).flatten()] << np.uint8(done)
            done += width
        return right_pack(moved, bits)

    return pack


def in_one_stream(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes follow one another, across bytes too, the low bits first."""
    of_codes = np.unpackbits(codes[..., None], axis=-1, count=bits, bitorder="little")
    return np.packbits(of_codes.reshape(*codes.shape[:-1], bits * GROUP), axis=-1, bitorder="little")


OF_NUMBERS = (
    Wrong("halves are rounded up: to the even number", "19.3", HalfUp()),
    Wrong("quotients are rounded down: to the nearest number", "19.3", Down()),
    Wrong("a row has one scale: each group of 32 numbers has its own", "19.1", OfRow()),
    Wrong("the range of a group is widened to hold 0: it is from the smallest to the largest", "19.2", WithZero()),
    Wrong("the last group is filled with zeros, which take part in its range: they do not", "19.1", FilledWithZeros()),
    Wrong("codes are signed, without a zero: they count from the smallest number", "19.3", Signed()),
    Wrong("the zero is not rounded: it is a whole number of sixteenths of a step", "19.3", NotRounded()),
    Wrong("the zero is a whole number of steps: of sixteenths of a step", "19.3", WholeSteps()),
    Wrong(
        "codes are rounded distances from the smallest number: the zero that is rounded is added",
        "19.3",
        FromTheSmallest(),
    ),
    Wrong("quotient and zero are rounded, then added: their sum is rounded", "19.3", RoundedApart()),
    Wrong("scales have no limit below: a zero must fit 16 bits", "19.2", WithoutLimit()),
    Wrong("scales are rounded to the nearest bfloat16: up to the next", "19.2", ToNearest()),
    Wrong("scales are float32: they are rounded up to bfloat16", "19.2", InFull()),
)
OF_RESULTS = (
    Wrong("groups are along the other axis: along the last one", "19.1", OfColumns()),
    Wrong("places without a number have codes: these are 0", "19.4", FilledWithTheLast()),
    Wrong("the range is computed in float32: in float64, rounded after the division", "19.2", InFloat32()),
    Wrong("a group of zeros has the scale 1: it has 0", "19.2", OneOfZeros()),
    Wrong("scales are rounded up from float64: from float32, to which they are rounded first", "19.2", AtOnce()),
)
PACKING = (
    Mistake(
        "codes that share a byte are neighbours: byte i of a plane of p bits holds the codes i, i + 4 p, ...",
        "19.4",
        (("quantization", "pack", packed_by(lambda width: np.arange(GROUP).reshape(-1, 8 // width).T)),),
    ),
    Mistake(
        "the first code of a byte is in its high bits: in its low bits",
        "19.4",
        (("quantization", "pack", packed_by(lambda width: np.arange(GROUP).reshape(8 // width, -1)[::-1])),),
    ),
    Mistake(
        "codes are one stream of bits: 3 bits are a plane of 2 and a plane of 1",
        "19.4",
        (("quantization", "pack", in_one_stream),),
    ),
)
