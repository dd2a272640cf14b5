"""Canonical similarity of each token to the centroid of its chunk: what tells the distinctive tokens apart."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .canonical import canonical_similarity
from .merge import merge
from .rows import chunk_base, load_rows

__all__ = ["BLOCK_TOKENS", "N_WARPS", "likeness_kernel", "likeness_to_mean"]

BLOCK_TOKENS = 8  # tokens of a program; 16 would need twice the registers, 4 would read in narrow loads
N_WARPS = 4


def likeness_to_mean(array: Tensor, size: int) -> Tensor:
    """Similarities of each chunk of `size` tokens.

    Parameters
    ----------
    array : (batch, heads, chunks * size, dim), any strides; float16, bfloat16 or float32; dim at most 256.

    Returns
    -------
    (batch * heads * chunks, size), float64.
    """
    batch, heads, tokens, dim = array.shape
    problems = batch * heads * (tokens // size)
    similarity = torch.empty(problems, size, dtype=torch.float64, device=array.device)
    if similarity.numel() == 0:
        return similarity
    one_cluster = torch.zeros(problems, size, dtype=torch.int64, device=array.device)
    means = merge(array, one_cluster, torch.full_like(one_cluster[:, :1], size))  # (problems, 1, dim)
    block_dim = triton.next_power_of_2(dim)
    likeness_kernel[(problems, triton.cdiv(size, BLOCK_TOKENS))](
        array,
        means,
        similarity,
        heads,
        tokens // size,
        *array.stride(),
        SIZE=size,
        DIM=dim,
        BLOCK_DIM=block_dim,
        STEPS=block_dim.bit_length() - 1,
        ROWS=BLOCK_TOKENS,
        num_warps=N_WARPS,
    )
    return similarity


@triton.jit
def likeness_kernel(
    array,
    means,
    similarity_out,
    heads,
    chunks,
    stride_batch,
    stride_head,
    stride_token,
    stride_dim,
    SIZE: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    STEPS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program: ROWS tokens of one chunk."""
    base = chunk_base(array, heads, chunks, stride_batch, stride_head, stride_token, SIZE)
    token = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    is_token = token < SIZE
    a = load_rows(base, token, is_token, stride_token, stride_dim, DIM, BLOCK_DIM).to(tl.float64)
    problem = tl.program_id(0).to(tl.int64) + tl.zeros((1,), tl.int64)
    mean = load_rows(means, problem, problem >= 0, DIM, 1, DIM, BLOCK_DIM).to(tl.float64)  # (1, BLOCK_DIM)
    similarity = canonical_similarity(a, tl.broadcast_to(mean, (ROWS, BLOCK_DIM)), ROWS, BLOCK_DIM, STEPS)
    tl.store(similarity_out + problem * SIZE + token, similarity, mask=is_token)
