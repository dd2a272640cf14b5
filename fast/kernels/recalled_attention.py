"""Attention to the rows of a cache that an index names, each read where it lies: no gathered copy is made.

As `.attention`, whose second stage this is too: splits of fixed length side by side, then combined in order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import attention

__all__ = ["attend_rows", "recalled_kernel"]


def attend_rows(query: Tensor, keys: Tensor, values: Tensor, rows: Tensor, scale: float) -> Tensor:
    """Attention output (batch, heads, group, dim_value), float32, of a group's query heads to the rows of their head.

    Parameters
    ----------
    query : (batch, heads, group, dim); float16, bfloat16 or float32.
    keys, values : (batch, heads, tokens, dim or dim_value), any strides; dim and dim_value at most 256.
    rows : (batch * heads, recalled), int64, any strides: which tokens to attend to, in any order; -1 stands for none,
        but at least one of a head must be there.
    """
    batch, heads, group, dim = query.shape
    dim_value, recalled = values.shape[3], rows.shape[1]
    problems, splits = batch * heads, triton.cdiv(recalled, attention.SPLIT)
    outputs = torch.empty(problems, splits, group, dim_value, dtype=torch.float32, device=query.device)
    sums = torch.empty(problems, splits, group, dtype=torch.float32, device=query.device)
    highest = torch.empty_like(sums)
    output = torch.empty(batch, heads, group, dim_value, dtype=torch.float32, device=query.device)
    dtypes = {query.dtype, keys.dtype, values.dtype}
    # Triton's interpreter multiplies bfloat16 wrongly; several dtypes meet in float32.
    widen = len(dtypes) > 1 or (triton.knobs.runtime.interpret and torch.bfloat16 in dtypes)
    block_dim = max(16, triton.next_power_of_2(dim))
    recalled_kernel[(splits, triton.cdiv(group, attention.ROWS), problems)](
        query.contiguous(),
        keys,
        values,
        rows,
        outputs,
        sums,
        highest,
        heads,
        group,
        recalled,
        scale,
        *keys.stride(),
        *values.stride(),
        *rows.stride(),
        DIM=dim,
        BLOCK_DIM=block_dim,
        DIM_VALUE=dim_value,
        BLOCK_VALUE=max(16, triton.next_power_of_2(dim_value)),
        ROWS=attention.ROWS,
        ENTRIES=attention.entries_of_step(block_dim, widen or query.dtype == torch.float32),
        SPLIT=attention.SPLIT,
        WIDEN=widen,
        num_warps=attention.N_WARPS,
        num_stages=attention.N_STAGES,
    )
    attention.combine_kernel[(problems * group,)](
        outputs,
        sums,
        highest,
        output,
        group,
        splits,
        DIM_VALUE=dim_value,
        BLOCK_VALUE=triton.next_power_of_2(dim_value),
        num_warps=attention.N_WARPS,
    )
    return output


@triton.jit
def recalled_kernel(
    query,
    keys,
    values,
    rows,
    outputs,
    sums,
    highest_out,
    heads,
    group,
    recalled,
    scale,
    key_batch,
    key_head,
    key_entry,
    key_dim,
    value_batch,
    value_head,
    value_entry,
    value_dim,
    row_problem,
    row_entry,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    DIM_VALUE: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    ROWS: tl.constexpr,
    ENTRIES: tl.constexpr,
    SPLIT: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """One program: ROWS query heads and SPLIT recalled rows of a KV head; else as `split_kernel`."""
    split = tl.program_id(0)
    problem = tl.program_id(2).to(tl.int64)
    member = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    is_member = member < group
    feature = tl.arange(0, BLOCK_DIM)
    feature_value = tl.arange(0, BLOCK_VALUE)
    q = tl.load(
        query + (problem * group + member)[:, None] * DIM + feature[None, :],
        mask=is_member[:, None] & (feature < DIM)[None, :],
        other=0.0,
    )  # (ROWS, BLOCK_DIM)
    if WIDEN:
        q = q.to(tl.float32)
    keys += problem // heads * key_batch + problem % heads * key_head
    values += problem // heads * value_batch + problem % heads * value_head
    rows += problem * row_problem

    total = tl.zeros((ROWS,), tl.float32)
    highest = tl.full((ROWS,), float("-inf"), tl.float32)
    output = tl.zeros((ROWS, BLOCK_VALUE), tl.float32)
    for step in range(0, SPLIT, ENTRIES):
        entry = split * SPLIT + step + tl.arange(0, ENTRIES)
        row = tl.load(rows + entry * row_entry, mask=entry < recalled, other=-1)
        is_entry = row >= 0
        key = tl.load(
            keys + row[None, :] * key_entry + feature[:, None] * key_dim,
            mask=is_entry[None, :] & (feature < DIM)[:, None],
            other=0.0,
        )  # (BLOCK_DIM, ENTRIES)
        if WIDEN:
            key = key.to(tl.float32)
        logits = scale * tl.dot(q, key, input_precision="ieee")  # (ROWS, ENTRIES)
        logits = tl.where(is_entry[None, :], logits, float("-inf"))
        raised = tl.maximum(highest, tl.max(logits, axis=1))
        base = tl.where(raised == float("-inf"), 0.0, raised)  # nothing seen yet
        shrink = tl.exp(highest - base)
        weights = tl.exp(logits - base[:, None])
        total = total * shrink + tl.sum(weights, axis=1)
        value = tl.load(
            values + row[:, None] * value_entry + feature_value[None, :] * value_dim,
            mask=is_entry[:, None] & (feature_value < DIM_VALUE)[None, :],
            other=0.0,
        )  # (ENTRIES, BLOCK_VALUE)
        if WIDEN:
            value = value.to(tl.float32)
        output = output * shrink[:, None] + tl.dot(weights.to(value.dtype), value, input_precision="ieee")
        highest = raised

    at = (problem * tl.num_programs(0) + split) * group + member
    tl.store(sums + at, total, mask=is_member)
    tl.store(highest_out + at, highest, mask=is_member)
    tl.store(
        outputs + at[:, None] * DIM_VALUE + feature_value[None, :],
        output,
        mask=is_member[:, None] & (feature_value < DIM_VALUE)[None, :],
    )
