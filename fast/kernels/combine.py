"""The second stage of attention: the splits of one query row, combined in their order."""

import triton
import triton.language as tl

__all__ = ["combine_kernel"]


@triton.jit
def combine_kernel(
    outputs, sums, highest_in, output_out, rows, splits, DIM_VALUE: tl.constexpr, BLOCK_VALUE: tl.constexpr
):
    """One program: the splits of one query row, one after the other."""
    row = tl.program_id(0).to(tl.int64)
    first = row // rows * splits * rows + row % rows
    feature = tl.arange(0, BLOCK_VALUE)
    is_feature = feature < DIM_VALUE
    top = tl.load(highest_in + first)
    for split in range(1, splits):
        top = tl.maximum(top, tl.load(highest_in + first + split * rows))
    total = tl.zeros((1,), tl.float32)
    output = tl.zeros((BLOCK_VALUE,), tl.float32)
    for split in range(0, splits):
        at = first + split * rows
        weight = tl.exp(tl.load(highest_in + at) - top)
        total += weight * tl.load(sums + at)
        output += weight * tl.load(outputs + at * DIM_VALUE + feature, mask=is_feature, other=0.0)
    tl.store(output_out + row * DIM_VALUE + feature, output / total, mask=is_feature)
