"""Most similar centroid of each token: filter, certificate, canonical scores for what stays open."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..exact.similarity import margin
from .canonical import canonical_similarity
from .match import UNIT, inverse_norm
from .rows import load_rows

__all__ = [
    "BLOCK_COLUMNS",
    "BLOCK_ROWS",
    "BLOCK_SCORED",
    "N_STAGES",
    "assign",
    "columns_of",
    "filter_kernel",
    "settle_kernel",
    "warps_of",
]

BLOCK_ROWS = 32  # tokens of a program
BLOCK_COLUMNS = 32  # clusters that are filtered together, in 16-bit numbers
BLOCK_SCORED = 4  # clusters that are scored canonically together
N_STAGES = 2
# Centroids of length 1 as the sum of two 16-bit numbers are off by at most 2**-18 (bfloat16) or 2**-20 (float16, whose
# subnormal numbers are 2**-24 apart). Of two cosines both are; the rest is for the rounding of the bound itself.
SPLIT_LEAD = {torch.float32: 0.0, torch.float16: 2.0**-16, torch.bfloat16: 2.0**-16}


def columns_of(dtype: torch.dtype) -> int:
    """Clusters that are filtered together: in float32 half as many, or some targets would spill registers."""
    return BLOCK_COLUMNS // 2 if dtype == torch.float32 else BLOCK_COLUMNS


def warps_of(dtype: torch.dtype, block_dim: int) -> int:
    """Warps of a program; fewer would spill registers in float32, and from 129 features in 16-bit numbers."""
    return 8 if dtype == torch.float32 or block_dim > 128 else 4


def assign(keys: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Labels of the tokens of each problem, for any number of clusters.

    Parameters
    ----------
    keys : (problems, tokens, dim), any strides; float16, bfloat16 or float32; dim at most 256.
    centroids : (problems, clusters, dim), float32.

    Returns
    -------
    labels : (problems, tokens), int64: the cluster of highest canonical similarity, of ties the first.
    is_scored : the same shape, bool: whether the filter left the token open.
    """
    problems, tokens, dim = keys.shape
    labels = torch.empty(problems, tokens, dtype=torch.int64, device=keys.device)
    threshold = torch.empty(problems, tokens, dtype=torch.float32, device=keys.device)
    if labels.numel() == 0:
        return labels, torch.empty_like(labels, dtype=torch.bool)
    block_dim = max(16, triton.next_power_of_2(dim))
    blocks = triton.cdiv(tokens, BLOCK_ROWS)
    # Triton's interpreter multiplies bfloat16 wrongly.
    widen = keys.dtype == torch.float32 or (triton.knobs.runtime.interpret and keys.dtype == torch.bfloat16)
    centroids = centroids.contiguous()
    warps = warps_of(keys.dtype, block_dim)
    sizes = {"DIM": dim, "BLOCK_DIM": block_dim, "num_warps": warps, "num_stages": N_STAGES}
    filter_kernel[(problems * blocks,)](
        keys,
        centroids,
        labels,
        threshold,
        blocks,
        tokens,
        centroids.shape[1],
        *keys.stride(),
        lead=margin(dim, UNIT[keys.dtype]) + SPLIT_LEAD[keys.dtype],
        ROWS=BLOCK_ROWS,
        COLUMNS=columns_of(keys.dtype),
        WIDEN=widen,
        **sizes,
    )
    settle_kernel[(problems * tokens,)](
        keys,
        centroids,
        labels,
        threshold,
        tokens,
        centroids.shape[1],
        *keys.stride(),
        STEPS=block_dim.bit_length() - 1,
        SCORED=BLOCK_SCORED,
        **sizes,
    )
    return labels, threshold < torch.inf


@triton.jit
def filter_kernel(
    keys,
    centroids,
    labels_out,
    threshold_out,
    blocks,
    tokens,
    clusters,
    stride_problem,
    stride_token,
    stride_dim,
    lead,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """One program: ROWS tokens of one problem; their labels, and how low a cosine may be where that is not proved.

    Where it is, infinity; where the key is not safe for float32, lower than any cosine.
    """
    problem = (tl.program_id(0) // blocks).to(tl.int64)
    keys += problem * stride_problem
    centroids += problem * clusters * DIM
    row = tl.arange(0, ROWS)
    first_token = (tl.program_id(0) % blocks).to(tl.int64) * ROWS
    is_token = first_token + row < tokens
    a = load_rows(keys, first_token + row, is_token, stride_token, stride_dim, DIM, BLOCK_DIM)
    a_inverse, is_safe = inverse_norm(a)

    # Best cosine to a centroid that is safe, its cluster, and the best of all others.
    best = tl.full((ROWS,), -4.0, tl.float32)
    second = tl.full((ROWS,), -4.0, tl.float32)
    label = tl.zeros((ROWS,), tl.int32)
    is_sure = is_safe
    for first in range(0, clusters, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        is_cluster = column < clusters
        b = load_rows(centroids, column, is_cluster, DIM, 1, DIM, BLOCK_DIM)
        b_inverse, is_safe_column = inverse_norm(b)
        is_sure &= tl.min((is_safe_column | ~is_cluster).to(tl.int32), axis=0) > 0
        if WIDEN:
            products = tl.dot(a.to(tl.float32), tl.trans(b), input_precision="ieee") * b_inverse[None, :]
        else:
            unit = tl.trans(b * b_inverse[:, None])  # (BLOCK_DIM, COLUMNS)
            high = unit.to(a.dtype)
            low = (unit - high.to(tl.float32)).to(a.dtype)
            products = tl.dot(a, high) + tl.dot(a, low)
        cosines = tl.where((is_cluster & is_safe_column)[None, :], products * a_inverse[:, None], -4.0)
        block_best, block_argmax = tl.max(cosines, axis=1, return_indices=True)
        others = tl.where(tl.arange(0, COLUMNS)[None, :] == block_argmax[:, None], -4.0, cosines)
        second = tl.maximum(tl.maximum(second, tl.max(others, axis=1)), tl.minimum(best, block_best))
        label = tl.where(block_best > best, first + block_argmax, label)
        best = tl.maximum(best, block_best)

    is_open = ~is_sure | (best - lead <= second)
    threshold = tl.where(is_open, tl.where(is_safe, best - lead, -8.0), float("inf"))
    offset = problem * tokens + first_token + row
    tl.store(labels_out + offset, label.to(tl.int64), mask=is_token)
    tl.store(threshold_out + offset, threshold, mask=is_token)


@triton.jit
def settle_kernel(
    keys,
    centroids,
    labels_out,
    threshold_in,
    tokens,
    clusters,
    stride_problem,
    stride_token,
    stride_dim,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    STEPS: tl.constexpr,
    SCORED: tl.constexpr,
):
    """One program: one token. Nothing to do for most; else canonical scores of the clusters above its threshold."""
    threshold = tl.load(threshold_in + tl.program_id(0))
    if threshold < float("inf"):
        problem = (tl.program_id(0) // tokens).to(tl.int64)
        token = (tl.program_id(0) % tokens).to(tl.int64) + tl.zeros((1,), tl.int64)
        keys += problem * stride_problem
        centroids += problem * clusters * DIM
        a = load_rows(keys, token, token < tokens, stride_token, stride_dim, DIM, BLOCK_DIM).to(tl.float32)
        unit = a * inverse_norm(a)[0][:, None]
        highest = tl.full((1,), -4.0, tl.float64)
        winner = tl.zeros((1,), tl.int32)
        for first in range(0, clusters, SCORED):
            column = first + tl.arange(0, SCORED)
            is_cluster = column < clusters
            b = load_rows(centroids, column, is_cluster, DIM, 1, DIM, BLOCK_DIM)
            b_inverse, is_safe = inverse_norm(b)
            cosines = tl.sum(unit * (b * b_inverse[:, None]), axis=1)
            is_candidate = is_cluster & (~is_safe | (cosines >= threshold))
            if tl.max(is_candidate.to(tl.int32), axis=0) > 0:
                a64 = tl.broadcast_to(a, (SCORED, BLOCK_DIM)).to(tl.float64)
                scores = canonical_similarity(a64, b.to(tl.float64), SCORED, BLOCK_DIM, STEPS)
                scores = tl.where(is_candidate, scores, -4.0)[None, :]  # (1, SCORED)
                top, top_column = tl.max(scores, axis=1, return_indices=True)  # of ties the first
                winner = tl.where(top > highest, first + top_column, winner)
                highest = tl.maximum(highest, top)
        tl.store(labels_out + problem * tokens + token, winner.to(tl.int64))
