"""The second stage of attention: what splits have seen of each query row, combined in their order."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Float32
from torch import Tensor

__all__ = ["N_WARPS", "Partials", "combine_kernel", "combined", "empty_partials"]

N_WARPS = 4


class Partials(NamedTuple):
    """What each split has seen: weighted values, sums of weights, and highest logits."""

    outputs: Float32[Tensor, "splits batch heads rows dim_value"]
    sums: Float32[Tensor, "splits batch heads rows"]
    highest: Float32[Tensor, "splits batch heads rows"]


def empty_partials(splits: int, query: Float[Tensor, "batch heads rows dim"], dim_value: int) -> Partials:
    """Memory that the splits have yet to write."""
    outputs = query.new_empty((splits, *query.shape[:-1], dim_value), dtype=torch.float32)
    return Partials(outputs, *(torch.empty_like(outputs[..., 0]) for _ in range(2)))


def combined(partials: Partials) -> Float32[Tensor, "batch heads rows dim_value"]:
    """The output of every query row."""
    splits, *lead, dim_value = partials.outputs.shape
    output = partials.outputs.new_empty((*lead, dim_value))
    combine_kernel[(torch.Size(lead).numel(),)](
        *partials,
        output,
        splits,
        DIM_VALUE=dim_value,
        BLOCK_VALUE=triton.next_power_of_2(dim_value),
        num_warps=N_WARPS,
    )
    return output


@triton.jit
def combine_kernel(outputs, sums, highest_in, output_out, splits, DIM_VALUE: tl.constexpr, BLOCK_VALUE: tl.constexpr):
    """One program: the splits of one query row, one after the other."""
    row = tl.program_id(0).to(tl.int64)
    rows = tl.num_programs(0)  # of all problems
    feature = tl.arange(0, BLOCK_VALUE)
    is_feature = feature < DIM_VALUE
    top = tl.load(highest_in + row)
    at = row
    for _ in range(1, splits):
        at += rows
        top = tl.maximum(top, tl.load(highest_in + at))
    total = tl.zeros((1,), tl.float32)
    output = tl.zeros((BLOCK_VALUE,), tl.float32)
    at = row
    for _ in range(0, splits):
        weight = tl.exp(tl.load(highest_in + at) - top)
        total += weight * tl.load(sums + at)
        output += weight * tl.load(outputs + at * DIM_VALUE + feature, mask=is_feature, other=0.0)
        at += rows
    tl.store(output_out + row * DIM_VALUE + feature, output / total, mask=is_feature)
