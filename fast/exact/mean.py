"""Means of clusters with the bits of the reference: members added in ascending token order in float64.

Two ways to the same bits. `ordered_sum` adds in that order, for all clusters side by side. `certified_mean` lets a
matrix product add in whatever order it likes, for chunks whose numbers are so close in size that no sum of them is
ever rounded in float64 (theory/exactness, claim E6): nearly all chunks of real keys and values. The others it adds
in order.
"""

from collections.abc import Iterable, Iterator

import torch
from jaxtyping import Bool, Float, Float32, Float64, Int32, Int64
from torch import Tensor

from .chunks import count_members

__all__ = ["certified_mean", "cluster_means", "merge_stored", "ordered_mean", "ordered_sum", "sums_are_exact"]

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
    parts = (
        (into, part.double() if points is None else (part.double() - points.index_select(0, into)).abs())
        for part, into in in_pieces(rows, labels)
    )
    if keys.device.type == "cpu":
        sums = sum_on_the_cpu(parts, len(counts), dim)
        means = (sums / counts.clamp(min=1).unsqueeze(-1)).float()
        means = torch.where(counts.unsqueeze(-1) > 0, means, kept.reshape(means.shape))
    else:
        is_used = counts > 0
        means = kept.reshape(-1, dim).clone()
        rows = torch.cat([part for _, part in parts])
        means[is_used] = ordered_mean(rows, (is_used.cumsum(0) - 1)[labels], counts[is_used])
    return counts.reshape(problems, n_clusters), means.reshape(kept.shape)


def merge_stored(
    keys: Float[Tensor, "problems entries dim"],
    values: Float[Tensor, "problems entries dim_value"],
    counts: Int32[Tensor, "problems entries"],
    labels: Int64[Tensor, "problems entries"],
    n_left: int,
) -> tuple[
    Float32[Tensor, "problems left dim"], Float32[Tensor, "problems left dim_value"], Int32[Tensor, "problems left"]
]:
    """Keys, values and counts of the `n_left` new entries that stored ones belong to by their labels.

    Each new key and value is the mean of old ones, weighted by their counts, which are below 2**29: so no product with
    a float32 number is rounded.
    """
    totals = torch.zeros(len(counts), n_left, dtype=counts.dtype, device=counts.device).scatter_add_(-1, labels, counts)
    new_keys, new_values = (
        (weighted_sum(array, counts, labels, n_left) / totals.unsqueeze(-1)).float() for array in (keys, values)
    )
    return new_keys, new_values, totals


def weighted_sum(array: Tensor, counts: Tensor, labels: Tensor, n_left: int) -> Float64[Tensor, "problems left dim"]:
    """Sum of each cluster's `count * entry`, in ascending order."""
    problems, _, dim = array.shape
    weights = counts.double().unsqueeze(-1)
    if array.device.type != "cpu":
        return ordered_sum(array.double() * weights, labels, count_members(labels, n_left))
    into = labels + torch.arange(problems, device="cpu")[:, None] * n_left
    pieces = in_pieces(array.reshape(-1, dim), weights.reshape(-1, 1), into.flatten())
    parts = ((into, rows.double() * weight) for rows, weight, into in pieces)
    return sum_on_the_cpu(parts, problems * n_left, dim).reshape(problems, n_left, dim)


def in_pieces(rows: Float[Tensor, "rows dim"], *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """`rows` and what belongs to them in pieces that need no more than WORKING_BYTES in float64."""
    together = max(1, WORKING_BYTES // (rows.shape[-1] * torch.float64.itemsize))
    return zip(*(x.split(together) for x in (rows, *others)), strict=True)


def sum_on_the_cpu(parts: Iterable[tuple[Tensor, Tensor]], n_sums: int, dim: int) -> Float64[Tensor, "sums dim"]:
    """Sums of all rows, in their order; `parts` are labels and the rows that they belong to."""
    sums = torch.full((n_sums, dim), -0.0, dtype=torch.float64, device="cpu")  # only -0.0 + x is x for every x
    for into, rows in parts:
        sums.index_add_(0, into, rows)  # on the CPU: "in the order given in index"
    return sums
