"""Attention to quantized entries beside exact ones: blocks are splits of their own, and codes are read as bytes.

A program reads one block after the other: packed codes go to registers, where they become numbers, and are never
written in another form. Blocks lie before the new tokens, so that every query row sees all their entries.
"""

import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..exact.blocks import BlockLayout, Packed
from ..exact.quantization import GROUP
from .attention import splits_of, write_splits
from .combine import Partials, combined, empty_partials

__all__ = [
    "FEATURES",
    "N_STAGES",
    "N_WARPS",
    "ROWS",
    "SPLIT_BLOCKS",
    "attend_packed",
    "constants_of",
    "packed_kernel",
    "rows_of_program",
]

ROWS = {"cuda": (4, 8), "hip": (16, 16)}  # query rows of a program, fewest and most
FEATURES = {4: 64, 8: 32, 16: 64}  # of keys that so many rows meet at once: with others, registers spill
SPLIT_BLOCKS = 8  # blocks of a program, 256 entries
N_WARPS, N_STAGES = 4, 2


def rows_of_program(rows: int, backend: str) -> int:
    """Query rows of a program: AMD's matrix instructions take 16 in float32; CUDA has none, and each row costs."""
    fewest, most = ROWS[backend]
    return fewest if rows <= fewest else most


def attend_packed(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    counts: Tensor,
    lengths: tuple[int, ...],
    firsts: tuple[int, ...],
    packed: Packed,
    queries: int,
    scale: float,
) -> Tensor:
    """As `kvcluster.fast.plain.attention.attend_packed`: exact entries by one launch, blocks by another."""
    heads = torch.tensor([lengths, firsts, packed.lengths, packed.firsts], device=query.device)
    n_exact, n_packed = splits_of(max(lengths)), triton.cdiv(max(packed.lengths), SPLIT_BLOCKS)
    partials = empty_partials(n_exact + n_packed, query, packed.layout.dim_value)
    keys, values, counts = (x.unsqueeze(1) for x in (keys, values, counts))
    write_splits(partials, query, keys, values, counts, queries, scale, entries=max(lengths), ragged=heads[:2])
    if n_packed > 0:
        write_splits_of_blocks(Partials(*(x[n_exact:] for x in partials)), query, packed, heads[2:], scale)
    return combined(partials).to(query.dtype)


def write_splits_of_blocks(partials: Partials, query: Tensor, packed: Packed, ragged: Tensor, scale: float) -> None:
    """Write what each split of the blocks has seen.

    Parameters
    ----------
    query : (batch, heads, rows, dim).
    ragged : (2, heads), int64: blocks of each head, and the place of its first.
    """
    batch, heads, rows, _ = query.shape
    blocks = packed.blocks if packed.blocks[0].is_contiguous() else packed.blocks.contiguous()
    of_program = rows_of_program(rows, "hip" if torch.version.hip else "cuda")
    packed_kernel[(len(partials.outputs), triton.cdiv(rows, of_program), batch * heads)](
        query.contiguous(),
        blocks,
        blocks.view(torch.int16),
        ragged,
        *partials,
        heads,
        rows,
        blocks.stride(0),
        scale,
        **constants_of(packed.layout),
        ROWS=of_program,
        FEATURES=FEATURES[of_program],
        SPLIT=SPLIT_BLOCKS,
        num_warps=N_WARPS,
        num_stages=N_STAGES,
    )


def constants_of(layout: BlockLayout) -> dict[str, int]:
    """What the kernel knows of a block when it is compiled: its sizes, and at which byte each part begins."""
    names = *(name.upper() for name in layout.shapes), "NBYTES"
    places = dict(zip(names, itertools.accumulate(layout.sizes, initial=0), strict=True))
    sizes = {"DIM": layout.dim, "DIM_VALUE": layout.dim_value, "GROUP": GROUP}
    sizes["GROUPS"] = triton.next_power_of_2(triton.cdiv(layout.dim_value, GROUP))
    return places | sizes | {"KEY_BITS": layout.bits[0], "VALUE_BITS": layout.bits[1]}


@triton.jit
def codes_at(at, number, is_there, BITS: tl.constexpr, GROUP: tl.constexpr):
    """The codes with these numbers, 0 to 31, of the groups whose bytes begin at `at`, int32."""
    if BITS == 3:  # a plane of two bits, then one of one
        low = codes_at(at, number, is_there, 2, GROUP)
        return low + 4 * codes_at(at + GROUP // 4, number, is_there, 1, GROUP)
    BYTES: tl.constexpr = GROUP * BITS // 8
    packed = tl.load(at + number % BYTES, mask=is_there, other=0).to(tl.int32)
    return (packed >> (number // BYTES * BITS)) & ((1 << BITS) - 1)


@triton.jit
def numbers_of(codes, scales, zeros):
    """What codes stand for, exact in float32; scales are bfloat16, the upper half of float32, read as int16."""
    steps = (scales.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return steps * (codes.to(tl.float32) - zeros.to(tl.float32) * 0.0625)


@triton.jit
def packed_kernel(
    query,
    blocks,
    shorts,
    ragged,
    outputs,
    sums,
    highest_out,
    heads,
    rows,
    block_batch,
    scale,
    KEY_CODES: tl.constexpr,
    VALUE_CODES: tl.constexpr,
    KEY_SCALES: tl.constexpr,
    KEY_ZEROS: tl.constexpr,
    VALUE_SCALES: tl.constexpr,
    VALUE_ZEROS: tl.constexpr,
    COUNTS: tl.constexpr,
    NBYTES: tl.constexpr,
    DIM: tl.constexpr,
    DIM_VALUE: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    KEY_BITS: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    ROWS: tl.constexpr,
    FEATURES: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """One program: ROWS query rows of one KV head and SPLIT of its blocks, `shorts` being the same bytes as int16."""
    split = tl.program_id(0)
    problem = tl.program_id(2).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    is_row = row < rows
    n_blocks = tl.load(ragged + problem % heads)
    first = problem // heads * block_batch + tl.load(ragged + heads + problem % heads) * NBYTES
    query += (problem * rows + row)[:, None] * DIM
    entry = tl.arange(0, GROUP)
    group = tl.arange(0, GROUPS)
    is_group = (group * GROUP < DIM_VALUE)[None, :]
    entry_of_group = group[None, :] * GROUP + entry[:, None]  # (GROUP, GROUPS), as the values' groups lie

    total = tl.zeros((ROWS,), tl.float32)
    highest = tl.full((ROWS,), float("-inf"), tl.float32)
    output = tl.zeros((ROWS, GROUPS * GROUP), tl.float32)
    for block in range(split * SPLIT, tl.minimum(n_blocks, (split + 1) * SPLIT)):
        codes = blocks + first + block * NBYTES
        parts = shorts + (first + block * NBYTES) // 2
        logits = tl.zeros((ROWS, GROUP), tl.float32)
        for step in tl.static_range(0, DIM, FEATURES):
            feature = step + tl.arange(0, FEATURES)
            is_feature = feature < DIM
            q = tl.load(query + feature[None, :], mask=is_row[:, None] & is_feature[None, :], other=0.0)
            key = numbers_of(
                codes_at(
                    codes + KEY_CODES + feature[:, None] * (GROUP * KEY_BITS // 8),
                    entry[None, :],
                    is_feature[:, None],
                    KEY_BITS,
                    GROUP,
                ),
                tl.load(parts + KEY_SCALES // 2 + feature, mask=is_feature, other=0)[:, None],
                tl.load(parts + KEY_ZEROS // 2 + feature, mask=is_feature, other=0)[:, None],
            )  # (FEATURES, GROUP)
            logits = tl.dot(q.to(tl.float32), key, logits, input_precision="ieee")
        count = tl.load(parts + COUNTS // 2 + entry).to(tl.int32)
        bias = tl.where(count > 0, tl.log(tl.maximum(count, 1).to(tl.float32)), float("-inf"))
        logits = scale * logits + bias[None, :]
        raised = tl.maximum(highest, tl.max(logits, axis=1))
        base = tl.where(raised == float("-inf"), 0.0, raised)  # nothing seen yet
        shrink = tl.exp(highest - base)
        weights = tl.exp(logits - base[:, None])
        total = total * shrink + tl.sum(weights, axis=1)
        value = numbers_of(
            codes_at(
                codes + VALUE_CODES + entry_of_group[:, :, None] * (GROUP * VALUE_BITS // 8),
                entry[None, None, :],  # here the features of a group
                is_group[:, :, None],
                VALUE_BITS,
                GROUP,
            ),
            tl.load(parts + VALUE_SCALES // 2 + entry_of_group, mask=is_group, other=0)[:, :, None],
            tl.load(parts + VALUE_ZEROS // 2 + entry_of_group, mask=is_group, other=0)[:, :, None],
        )  # (GROUP, GROUPS, GROUP)
        value = tl.reshape(value, (GROUP, GROUPS * GROUP))
        output = output * shrink[:, None] + tl.dot(weights, value, input_precision="ieee")
        highest = raised

    at = split * tl.num_programs(2) * rows + problem * rows + row
    feature_value = tl.arange(0, GROUPS * GROUP)
    tl.store(sums + at, total, mask=is_row)
    tl.store(highest_out + at, highest, mask=is_row)
    tl.store(
        outputs + at[:, None] * DIM_VALUE + feature_value[None, :],
        output,
        mask=is_row[:, None] & (feature_value < DIM_VALUE)[None, :],
    )
