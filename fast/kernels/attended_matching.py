"""The margins of attended matching by a kernel: canonical dot products; torch finds what they are compared with."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..exact.margins import largest_margins
from .canonical import halving_sum
from .rows import load_rows

__all__ = ["BLOCK_TOKENS", "N_WARPS", "attention_margins", "dots_kernel"]

BLOCK_TOKENS = 8  # tokens of a program, as in `likeness`
N_WARPS = 4
WORKING_BYTES = 2**28  # of dot products at once


def attention_margins(keys: Tensor, queries: Tensor) -> Tensor:
    """As `kvcluster.fast.plain.attended_matching.attention_margins`; dim at most 256."""
    chunks, size, dim = keys.shape
    n_queries = queries.shape[1]
    margins = torch.empty(chunks, size, dtype=torch.float64, device=keys.device)
    block_dim = triton.next_power_of_2(dim)
    together = max(1, WORKING_BYTES // (8 * n_queries * size))
    parts = zip(keys.split(together), queries.contiguous().split(together), margins.split(together), strict=True)
    for some_keys, some_queries, into in parts:
        dots = torch.empty(len(some_keys), n_queries, size, dtype=torch.float64, device=keys.device)
        if dots.numel() == 0:
            continue
        dots_kernel[(len(some_keys), triton.cdiv(size, BLOCK_TOKENS))](
            some_keys,
            some_queries,
            dots,
            n_queries,
            *some_keys.stride(),
            SIZE=size,
            DIM=dim,
            BLOCK_DIM=block_dim,
            STEPS=block_dim.bit_length() - 1,
            ROWS=BLOCK_TOKENS,
            num_warps=N_WARPS,
        )
        into.copy_(largest_margins(dots))
    return margins


@triton.jit
def dots_kernel(
    keys,
    queries,
    dots_out,
    n_queries,
    stride_chunk,
    stride_token,
    stride_dim,
    SIZE: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    STEPS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program: ROWS tokens of one chunk, with all of its queries."""
    chunk = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    is_token = token < SIZE
    key = load_rows(keys + chunk * stride_chunk, token, is_token, stride_token, stride_dim, DIM, BLOCK_DIM)
    key = key.to(tl.float64)
    for number in range(n_queries):
        row = chunk * n_queries + number + tl.zeros((1,), tl.int64)
        query = load_rows(queries, row, row >= 0, DIM, 1, DIM, BLOCK_DIM).to(tl.float64)  # (1, BLOCK_DIM)
        dots = halving_sum(key * tl.broadcast_to(query, (ROWS, BLOCK_DIM)), ROWS, BLOCK_DIM, STEPS)
        tl.store(dots_out + row * SIZE + token, dots, mask=is_token)
