"""Canonical similarity of each source to its destination: what decides who merges where not all may."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .canonical import canonical_similarity
from .rows import chunk_base, load_rows

__all__ = ["BLOCK_SOURCES", "N_WARPS", "score", "score_kernel"]

BLOCK_SOURCES = 1  # sources of a program; more of them need more registers than there are
N_WARPS = 4


def score(keys: Tensor, size: int, destination: Tensor) -> Tensor:
    """Similarities of each chunk of `size` entries.

    Parameters
    ----------
    keys : (batch, heads, chunks * size, dim), any strides; float16, bfloat16 or float32; dim at most 256.
    destination : (batch * heads * chunks, sources), int64, as `match` gives it.

    Returns
    -------
    (batch * heads * chunks, sources), float64.
    """
    _, heads, tokens, dim = keys.shape
    similarity = torch.empty(destination.shape, dtype=torch.float64, device=keys.device)
    if similarity.numel() == 0:
        return similarity
    block_dim = triton.next_power_of_2(dim)
    score_kernel[(len(similarity), triton.cdiv(similarity.shape[1], BLOCK_SOURCES))](
        keys,
        destination,
        similarity,
        heads,
        tokens // size,
        size,
        *keys.stride(),
        DIM=dim,
        BLOCK_DIM=block_dim,
        STEPS=block_dim.bit_length() - 1,
        ROWS=BLOCK_SOURCES,
        num_warps=N_WARPS,
    )
    return similarity


@triton.jit
def score_kernel(
    keys,
    destination_in,
    similarity_out,
    heads,
    chunks,
    size,
    stride_batch,
    stride_head,
    stride_token,
    stride_dim,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    STEPS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program: ROWS sources of one chunk."""
    n_sources = (size + 1) // 2
    base = chunk_base(keys, heads, chunks, stride_batch, stride_head, stride_token, size)
    source = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    is_source = source < n_sources
    offset = tl.program_id(0).to(tl.int64) * n_sources + source
    destination = tl.load(destination_in + offset, mask=is_source, other=0)
    a = load_rows(base, 2 * source, is_source, stride_token, stride_dim, DIM, BLOCK_DIM).to(tl.float64)
    b = load_rows(base, 2 * destination + 1, is_source, stride_token, stride_dim, DIM, BLOCK_DIM).to(tl.float64)
    similarity = canonical_similarity(a, b, ROWS, BLOCK_DIM, STEPS)
    tl.store(similarity_out + offset, similarity, mask=is_source)
