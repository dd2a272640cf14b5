"""Best destination of each source of each chunk: filter, certificate, canonical scores for what stays open."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..exact.similarity import SAFE_NORM, margin
from .canonical import canonical_similarity
from .rows import chunk_base, load_rows

__all__ = ["BLOCK_COLUMNS", "BLOCK_ROWS", "BLOCK_SCORED", "N_STAGES", "N_WARPS", "match", "match_kernel"]

BLOCK_ROWS = 16  # sources of a program
BLOCK_COLUMNS = 32  # destinations that are filtered together
BLOCK_SCORED = 8  # destinations that are scored canonically together; 4 or 16 would spill registers
N_WARPS = {"cuda": 8, "hip": 4}  # with others, registers spill
N_STAGES = 1  # loads that run ahead of the loop would spill registers, too
# What one addition in float32 may lose. Tensor cores add products of 16-bit numbers less carefully than IEEE 754 asks.
UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-21, torch.bfloat16: 2.0**-21}
LOWEST_NORM = tl.constexpr(SAFE_NORM[0])
HIGHEST_NORM = tl.constexpr(SAFE_NORM[1])


def match(keys: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Matches of each chunk of `size` entries.

    Parameters
    ----------
    keys : (batch, heads, chunks * size, dim), any strides; float16, bfloat16 or float32; dim at most 256.

    Returns
    -------
    destination : (batch * heads * chunks, sources), int64: as `Matches.destination`.
    is_scored : the same shape, bool: whether the filter left the match open.
    """
    batch, heads, tokens, dim = keys.shape
    chunks = tokens // size
    shape = (batch * heads * chunks, (size + 1) // 2)
    destination = torch.empty(shape, dtype=torch.int64, device=keys.device)
    is_scored = torch.empty(shape, dtype=torch.bool, device=keys.device)
    if destination.numel() == 0:
        return destination, is_scored
    block_dim = max(16, triton.next_power_of_2(dim))
    match_kernel[(shape[0], triton.cdiv(shape[1], BLOCK_ROWS))](
        keys,
        destination,
        is_scored,
        heads,
        chunks,
        size,
        *keys.stride(),
        lead=margin(dim, UNIT[keys.dtype]),
        DIM=dim,
        BLOCK_DIM=block_dim,
        STEPS=block_dim.bit_length() - 1,
        ROWS=BLOCK_ROWS,
        COLUMNS=BLOCK_COLUMNS,
        SCORED=BLOCK_SCORED,
        WIDEN=triton.knobs.runtime.interpret and keys.dtype == torch.bfloat16,  # it gets their products wrong
        num_warps=N_WARPS["hip" if torch.version.hip else "cuda"],
        num_stages=N_STAGES,
    )
    return destination, is_scored


@triton.jit
def inverse_norm(keys):
    """1 / length of each row of `keys` in float32, 0 where that is not safe, and whether it is."""
    keys32 = keys.to(tl.float32)
    norm = tl.sqrt(tl.sum(keys32 * keys32, axis=1))
    is_safe = (norm > LOWEST_NORM) & (norm < HIGHEST_NORM)
    return tl.where(is_safe, 1 / tl.where(is_safe, norm, 1.0), 0.0), is_safe


@triton.jit
def match_kernel(
    keys,
    destination_out,
    is_scored_out,
    heads,
    chunks,
    size,
    stride_batch,
    stride_head,
    stride_token,
    stride_dim,
    lead,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    STEPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SCORED: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """One program: ROWS sources of one chunk. Sources are the entries 0, 2, ..., destinations 1, 3, ... of it."""
    n_sources = (size + 1) // 2
    n_destinations = size // 2
    base = chunk_base(keys, heads, chunks, stride_batch, stride_head, stride_token, size)
    row = tl.arange(0, ROWS)
    source = tl.program_id(1) * ROWS + row
    is_source = source < n_sources
    a = load_rows(base, 2 * source, is_source, stride_token, stride_dim, DIM, BLOCK_DIM)
    a_inverse, is_safe = inverse_norm(a)

    # The filter: best cosine, its destination, and the best of all others. Cosines are at least -1, up to rounding.
    best = tl.full((ROWS,), -4.0, tl.float32)
    second = tl.full((ROWS,), -4.0, tl.float32)
    destination = tl.zeros((ROWS,), tl.int32)
    for first in range(0, n_destinations, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        is_destination = column < n_destinations
        b = load_rows(base, 2 * column + 1, is_destination, stride_token, stride_dim, DIM, BLOCK_DIM)
        b_inverse, is_safe_column = inverse_norm(b)
        is_safe &= tl.min((is_safe_column | ~is_destination).to(tl.int32), axis=0) > 0
        if WIDEN:
            products = tl.dot(a.to(tl.float32), tl.trans(b.to(tl.float32)), input_precision="ieee")
        else:
            products = tl.dot(a, tl.trans(b), input_precision="ieee")
        cosines = products * a_inverse[:, None] * b_inverse[None, :]
        cosines = tl.where(is_destination[None, :], cosines, -4.0)  # (ROWS, COLUMNS)
        block_best, block_argmax = tl.max(cosines, axis=1, return_indices=True)
        others = tl.where(tl.arange(0, COLUMNS)[None, :] == block_argmax[:, None], -4.0, cosines)
        second = tl.maximum(tl.maximum(second, tl.max(others, axis=1)), tl.minimum(best, block_best))
        destination = tl.where(block_best > best, first + block_argmax, destination)
        best = tl.maximum(best, block_best)

    is_open = is_source & (~is_safe | (best - lead <= second))
    is_left = is_open
    for _ in range(tl.sum(is_open.to(tl.int32), axis=0)):
        open_row = ROWS - tl.max(tl.where(is_left, ROWS - row, 0), axis=0)  # the first row that is still open
        is_left &= row != open_row
        entry = 2 * (tl.program_id(1) * ROWS + open_row) + tl.zeros((SCORED,), tl.int32)
        a64 = load_rows(base, entry, entry >= 0, stride_token, stride_dim, DIM, BLOCK_DIM).to(tl.float64)
        highest = tl.full((1,), -4.0, tl.float64)
        winner = tl.zeros((1,), tl.int32)
        for first in range(0, n_destinations, SCORED):
            column = first + tl.arange(0, SCORED)
            is_destination = column < n_destinations
            b = load_rows(base, 2 * column + 1, is_destination, stride_token, stride_dim, DIM, BLOCK_DIM)
            scores = canonical_similarity(a64, b.to(tl.float64), SCORED, BLOCK_DIM, STEPS)
            scores = tl.where(is_destination, scores, -4.0)[None, :]  # (1, SCORED)
            top, top_column = tl.max(scores, axis=1, return_indices=True)  # of ties the first
            winner = tl.where(top > highest, first + top_column, winner)
            highest = tl.maximum(highest, top)
        destination = tl.where(row == open_row, winner, destination)

    offset = tl.program_id(0).to(tl.int64) * n_sources + source
    tl.store(destination_out + offset, destination.to(tl.int64), mask=is_source)
    tl.store(is_scored_out + offset, is_open, mask=is_source)
