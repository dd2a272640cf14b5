"""Means of clusters: members added in ascending token order in float64, rounded once; no atomic additions."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arguments import with_four_axes

__all__ = ["BLOCK_ENTRIES", "N_WARPS", "merge", "merge_clusters", "merge_kernel"]

BLOCK_ENTRIES = 8  # entries of a program
N_WARPS = 4


def merge_clusters(array: Tensor, labels: Tensor, counts: Tensor) -> Tensor:
    """As `kvcluster.fast.exact.mean.ordered_mean`: any leading axes."""
    problems = array.shape[:-2].numel()
    means = merge(with_four_axes(array), *(x.reshape(problems, x.shape[-1]) for x in (labels, counts)))
    return means.reshape(*counts.shape, array.shape[-1])


def merge(array: Tensor, labels: Tensor, counts: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean of each cluster.

    Parameters
    ----------
    array : (batch, heads, tokens, dim), any strides; float16, bfloat16 or float32; dim at most 256.
    labels : (problems, tokens of a problem), int64; batch * heads problems, or that many times the chunks of each.
    counts : (problems, entries), int64: members of each cluster.
    weights : (problems, tokens of a problem), int32, from 1 to 2**29, so that no product with a float32 number is
        rounded. None: all tokens weigh the same.

    Returns
    -------
    (problems, entries, dim), float32.
    """
    _, heads, tokens, dim = array.shape
    problems, entries = counts.shape
    span = labels.shape[1]  # tokens of a problem
    members = labels.argsort(dim=1, stable=True)  # cluster after cluster, ascending inside each
    members += torch.arange(problems, device=labels.device)[:, None] * span
    first = (counts.cumsum(1) - counts) + torch.arange(problems, device=labels.device)[:, None] * span
    means = torch.empty(problems, entries, dim, dtype=torch.float32, device=array.device)
    if means.numel() == 0:
        return means
    merge_kernel[(triton.cdiv(problems * entries, BLOCK_ENTRIES),)](
        array,
        members,
        first.contiguous(),
        counts.contiguous(),
        array if weights is None else weights.contiguous(),
        means,
        problems * entries,
        heads,
        tokens,
        *array.stride(),
        DIM=dim,
        BLOCK_DIM=triton.next_power_of_2(dim),
        ENTRIES=BLOCK_ENTRIES,
        HAS_WEIGHTS=weights is not None,
        num_warps=N_WARPS,
    )
    return means


@triton.jit
def merge_kernel(
    array,
    members,
    first_member,
    counts,
    weights,
    means,
    n_entries,
    heads,
    tokens,
    stride_batch,
    stride_head,
    stride_token,
    stride_dim,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    ENTRIES: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
):
    """One program: ENTRIES clusters, in as many steps as the largest of them has members."""
    entry = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    is_entry = entry < n_entries
    count = tl.load(counts + entry, mask=is_entry, other=0)
    first = tl.load(first_member + entry, mask=is_entry, other=0)
    feature = tl.arange(0, BLOCK_DIM)
    is_feature = feature < DIM
    # -0.0, for only -0.0 + x is x for every x; a product, because Triton writes the constant -0.0 as 0.0.
    sums = tl.zeros((ENTRIES, BLOCK_DIM), tl.float64) * -1.0
    total = count
    if HAS_WEIGHTS:
        total = tl.zeros((ENTRIES,), tl.int64)
    for rank in range(0, tl.max(count, axis=0)):
        is_member = rank < count
        token = tl.load(members + first + rank, mask=is_member, other=0)  # counted over all problems
        head = token // tokens
        offset = head // heads * stride_batch + head % heads * stride_head + token % tokens * stride_token
        pointers = array + offset[:, None] + feature[None, :] * stride_dim
        tokens64 = tl.load(pointers, mask=is_member[:, None] & is_feature[None, :], other=0.0).to(tl.float64)
        if HAS_WEIGHTS:
            weight = tl.load(weights + token, mask=is_member, other=0)
            total += weight
            tokens64 *= weight.to(tl.float64)[:, None]
        sums = tl.where(is_member[:, None], sums + tokens64, sums)
    mean = (sums / total.to(tl.float64)[:, None]).to(tl.float32)
    tl.store(means + entry[:, None] * DIM + feature[None, :], mean, mask=is_entry[:, None] & is_feature[None, :])
