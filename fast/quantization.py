"""Numbers in few bits, on torch tensors."""

from dataclasses import dataclass

from jaxtyping import BFloat16, Float, Float32, Int16, UInt8
from torch import Tensor

from .arguments import check_array, check_half_range
from .exact.quantization import GROUP, check_bits, codes_of, numbers_of, padded_to_groups

__all__ = ["Quantized", "dequantize", "quantize"]


@dataclass(frozen=True, eq=False)
class Quantized:
    """Numbers `scale * (code - zero / 16)` in groups of 32: as in `kvcluster.reference.quantize`, scales bfloat16."""

    codes: UInt8[Tensor, "*lead groups bytes"]
    scales: BFloat16[Tensor, "*lead groups"]
    zeros: Int16[Tensor, "*lead groups"]

    @property
    def bits(self) -> int:
        return self.codes.shape[-1] * 8 // GROUP

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes + self.zeros.nbytes


def quantize(array: Float[Tensor, "*lead rows numbers"], *, bits: int) -> Quantized:
    """Numbers of `array` as codes of `bits` bits, 32 along the last axis with one scale and one zero.

    Defined, with its errors, by `kvcluster.reference.quantize`: the same bits, on the device of `array`.
    """
    check_array("array", array)
    bits = check_bits(bits)
    check_half_range("array", array, "to be quantized")
    return Quantized(*codes_of(padded_to_groups(array), bits, array.shape[-1]))


def dequantize(quantized: Quantized, n_numbers: int) -> Float32[Tensor, "*lead rows numbers"]:
    """The first `n_numbers` numbers along the last axis, as they are read back: float32, without any rounding."""
    numbers = numbers_of(quantized.codes, quantized.scales, quantized.zeros)
    return numbers.flatten(-2)[..., :n_numbers]
