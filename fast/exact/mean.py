"""Means of clusters with the bits of the reference: members added in ascending token order in float64.

Two ways to the same bits. `ordered_sum` adds in that order, for all clusters side by side. `certified_mean` lets a
matrix product add in whatever order it likes, for chunks whose numbers are so close in size that no sum of them is
ever rounded in float64 (theory/exactness, claim E6): nearly all chunks of real keys and values. The others it adds
in order.
"""

import torch
from jaxtyping import Bool, Float, Float32, Float64, Int64
from torch import Tensor

__all__ = ["certified_mean", "cluster_means", "ordered_mean", "ordered_sum", "sums_are_exact"]

WORKING_BYTES = 2 * 2**20  # of float64 numbers that are added together


def ordered_mean(
    array: Float[Tensor, "*lead tokens dim"],
    labels: Int64[Tensor, "*lead tokens"],
    counts: Int64[Tensor, "*lead entries"],
) -> Float32[Tensor, "*lead entries dim"]:
    """Mean of each cluster."""
    return (ordered_sum(array, labels, counts) / counts.unsqueeze(-1)).float()


def ordered_sum(
    array: Float[Tensor, "*lead tokens dim"],
    labels: Int64[Tensor, "*lead tokens"],
    counts: Int64[Tensor, "*lead entries"],
) -> Float64[Tensor, "*lead entries dim"]:
    """Sum of each cluster, in as many steps as the largest cluster has members; no atomic additions."""
    entries, dim = counts.shape[-1], array.shape[-1]
    tokens = array.reshape(-1, dim)  # (problems * tokens, dim)
    offsets = torch.arange(counts.shape[:-1].numel(), device=labels.device) * entries  # first entry of each problem
    labels = (labels.reshape(len(offsets), labels.shape[-1]) + offsets[:, None]).reshape(-1)
    counts = counts.reshape(-1)  # (problems * entries,)
    members = labels.argsort(stable=True)  # tokens, cluster after cluster, ascending inside each
    first = counts.cumsum(0) - counts  # where each cluster begins in `members`
    sums = tokens[members[first]].double()
    for rank in range(1, int(counts.max()) if len(counts) else 0):
        larger = (counts > rank).nonzero().squeeze(-1)  # clusters that have a member of this rank
        sums[larger] += tokens[members[first[larger] + rank]].double()
    return sums.reshape(*array.shape[:-2], entries, dim)


def sums_are_exact(chunks: Float[Tensor, "chunks chunk dim"]) -> Bool[Tensor, " chunks"]:
    """Whether float64 sums of each chunk's tokens are exact in any order, and none is -0.0 (claim E6)."""
    sizes = chunks.float().abs()
    smallest, largest = sizes.amin(dim=(1, 2)), sizes.amax(dim=(1, 2))
    chunk = (smallest == 0).nonzero().squeeze(-1)
    if len(chunk):  # a zero rounds no sum, so the others count; but the sign of a zero can depend on the order
        is_zero = chunks[chunk] == 0
        smallest[chunk] = torch.where(is_zero, torch.inf, sizes[chunk]).amin(dim=(1, 2))
        smallest[chunk[(is_zero & chunks[chunk].signbit()).any(dim=2).any(dim=1)]] = -1
    return chunks.shape[1] * largest.double() <= 2.0**29 * smallest.double()


def certified_mean(
    chunks64: Float64[Tensor, "chunks chunk dim"],
    is_exact: Bool[Tensor, " chunks"],
    labels: Int64[Tensor, "chunks chunk"],
    counts: Int64[Tensor, "chunks entries"],
) -> Float32[Tensor, "chunks entries dim"]:
    """`ordered_mean` of each chunk; `is_exact` as `sums_are_exact` says."""
    is_member = torch.zeros(*counts.shape, labels.shape[-1], dtype=torch.float64, device=labels.device)
    is_member.scatter_(1, labels.unsqueeze(1), 1.0)
    means = (is_member @ chunks64).div_(counts.unsqueeze(-1)).float()  # (chunks, entries, dim)
    chunk = (~is_exact).nonzero().squeeze(-1)
    if len(chunk):
        means[chunk] = ordered_mean(chunks64[chunk], labels[chunk], counts[chunk])
    return means


def cluster_means(
    keys: Float[Tensor, "problems tokens dim"],
    labels: Int64[Tensor, "problems tokens"],
    kept: Float32[Tensor, "problems clusters dim"],
    away_from: Float32[Tensor, "problems clusters dim"] | None = None,
) -> tuple[Int64[Tensor, "problems clusters"], Float32[Tensor, "problems clusters dim"]]:
    """Counts and means of the clusters of `keys`; an empty cluster keeps what `kept` has.

    With `away_from` means of |key - away_from of its cluster|.
    """
    problems, n_clusters, dim = kept.shape
    rows = keys.reshape(-1, dim)
    labels = (labels + torch.arange(problems, device=keys.device)[:, None] * n_clusters).flatten()
    counts = torch.bincount(labels, minlength=problems * n_clusters)
    points = None if away_from is None else away_from.double().reshape(-1, dim)
    pieces = zip(
        *(x.split(max(1, WORKING_BYTES // (dim * torch.float64.itemsize))) for x in (rows, labels)), strict=True
    )
    parts = (
        (into, part.double() if points is None else (part.double() - points.index_select(0, into)).abs())
        for part, into in pieces
    )
    if keys.device.type == "cpu":
        sums = torch.full((len(counts), dim), -0.0, dtype=torch.float64)  # only -0.0 + x is x for every x
        for into, part in parts:
            sums.index_add_(0, into, part)  # on the CPU: "in the order given in index"
        means = (sums / counts.clamp(min=1).unsqueeze(-1)).float()
        means = torch.where(counts.unsqueeze(-1) > 0, means, kept.reshape(means.shape))
    else:
        is_used = counts > 0
        means = kept.reshape(-1, dim).clone()
        rows = torch.cat([part for _, part in parts])
        means[is_used] = ordered_mean(rows, (is_used.cumsum(0) - 1)[labels], counts[is_used])
    return counts.reshape(problems, n_clusters), means.reshape(kept.shape)
