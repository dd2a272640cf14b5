"""Blocks of quantized entries: what 32 entries of a KV head are in bytes, and back."""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Float32, Int, Int32, UInt8
from torch import Tensor

from .quantization import GROUP, codes_of, numbers_of, padded_to_groups

__all__ = ["BlockLayout", "Packed", "pack", "put_in", "unpack"]


@dataclass(frozen=True)
class BlockLayout:
    """Where the parts of a block lie in its bytes, one behind the other.

    They are the codes of the keys (dim, 4 * bits) and of the values (groups, 32, 4 * bits), scales and zeros of the
    keys (dim), scales and zeros of the values (groups, 32), and the counts (32), int16. Keys share a scale channel by
    channel, values entry by entry, over a group of 32 features.

    Attributes
    ----------
    dim, dim_value : features of keys and values.
    bits : of the codes of keys and of values.
    """

    dim: int
    dim_value: int
    bits: tuple[int, int]

    @cached_property
    def shapes(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of each part, in their order."""
        groups = -(-self.dim_value // GROUP)
        return {
            "key_codes": (torch.uint8, (self.dim, 4 * self.bits[0])),
            "value_codes": (torch.uint8, (groups, GROUP, 4 * self.bits[1])),
            "key_scales": (torch.bfloat16, (self.dim,)),
            "key_zeros": (torch.int16, (self.dim,)),
            "value_scales": (torch.bfloat16, (groups, GROUP)),
            "value_zeros": (torch.int16, (groups, GROUP)),
            "counts": (torch.int16, (GROUP,)),
        }

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Bytes of each part."""
        return tuple(dtype.itemsize * math.prod(shape) for dtype, shape in self.shapes.values())

    @cached_property
    def nbytes(self) -> int:
        """Bytes of a block."""
        return sum(self.sizes)


@dataclass(frozen=True, eq=False)
class Packed:
    """The blocks of all KV heads of a layer, head after head, as attention reads them.

    Attributes
    ----------
    blocks : (batch, places, nbytes), uint8.
    lengths, firsts : how many blocks a head has, and its first place.
    """

    layout: BlockLayout
    blocks: UInt8[Tensor, "batch places nbytes"]
    lengths: tuple[int, ...]
    firsts: tuple[int, ...]

    def of_head(self, head: int) -> tuple[Float32[Tensor, "batch entries dim"], Tensor, Int32[Tensor, "batch entries"]]:
        """Keys, values and counts of one head, as they are read back."""
        first = self.firsts[head]
        return unpack(self.blocks[:, first : first + self.lengths[head]], self.layout)


def pack(
    keys: Float[Tensor, "*lead entries dim"],
    values: Float[Tensor, "*lead entries dim_value"],
    counts: Int[Tensor, "*lead entries"],
    layout: BlockLayout,
) -> UInt8[Tensor, "*lead blocks nbytes"]:
    """Entries, a multiple of 32 of them, as blocks."""
    n_blocks = counts.shape[-1] // GROUP
    in_blocks = [x.unflatten(-2, (n_blocks, GROUP)) for x in (keys, values)]  # (..., blocks, 32, dim)
    of_channels = codes_of(in_blocks[0].mT, layout.bits[0], GROUP)
    codes, scales, zeros = codes_of(padded_to_groups(in_blocks[1]), layout.bits[1], layout.dim_value)
    of_values = codes.transpose(-2, -3), scales.mT, zeros.mT  # (..., groups, 32, .)
    parts: list[Tensor] = [of_channels[0], of_values[0], *of_channels[1:], *of_values[1:]]
    parts.append(counts.unflatten(-1, (n_blocks, GROUP)).to(torch.int16))
    lead = parts[-1].shape[:-1]
    in_bytes = [part.contiguous().view(torch.uint8) for part in parts]
    return torch.cat([x.reshape(*lead, n) for x, n in zip(in_bytes, layout.sizes, strict=True)], dim=-1)


def unpack(
    blocks: UInt8[Tensor, "*lead blocks nbytes"], layout: BlockLayout
) -> tuple[
    Float32[Tensor, "*lead entries dim"], Float32[Tensor, "*lead entries dim_value"], Int32[Tensor, "*lead entries"]
]:
    """Keys, values and counts as they are read back."""
    parts, first = {}, 0
    for (name, (dtype, shape)), size in zip(layout.shapes.items(), layout.sizes, strict=True):
        part = blocks[..., first : first + size].contiguous().view(dtype)
        parts[name] = part.view(*blocks.shape[:-1], *shape)
        first += size
    keys = numbers_of(parts["key_codes"], parts["key_scales"], parts["key_zeros"]).mT
    of_groups = numbers_of(parts["value_codes"], parts["value_scales"], parts["value_zeros"])  # (..., groups, 32, 32)
    values = of_groups.transpose(-2, -3).flatten(-2)
    return keys.flatten(-3, -2), values[..., : layout.dim_value].flatten(-3, -2), parts["counts"].int().flatten(-2)


def put_in(array: Tensor, place: int, part: Tensor, axis: int) -> Tensor:
    """`array` with `part`, if it holds any, before its index `place` along an axis, in the wider dtype of the two."""
    if part.shape[axis] == 0:
        return array
    dtype = torch.promote_types(array.dtype, part.dtype)
    before, after = array.tensor_split((place,), dim=axis)
    return torch.cat([x.to(dtype) for x in (before, part, after)], dim=axis)
