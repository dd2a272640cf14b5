"""All chunks at once: matched in rounds, then averaged. The work behind `chunked_soft_matching` and the cache."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from .arguments import with_four_axes
from .backends import choose_backend
from .exact_mean import certified_mean, sums_are_exact
from .exact_similarity import certified_matches, certified_top
from .partition import alternating_partition

__all__ = ["CompressedChunks", "compress", "count_members", "renumber"]

# Chunks are worked on together up to this many bytes in float64, so that they stay in the processor's cache.
WORKING_BYTES = 4 * 2**20


@dataclass(frozen=True, eq=False)
class CompressedChunks:
    """Clusters of each chunk, their centroids, and how much of the work the filter could not settle.

    Attributes
    ----------
    labels : (chunks, chunk), int64: entry of each token, from 0 in each chunk.
    counts : (chunks, entries), int64.
    keys : (chunks, entries, dim), float32 centroids.
    values : (chunks, entries, dim_value), float32 centroids; None where no values were given.
    n_rows : sources matched, in all rounds.
    n_scored_rows : of these, the ones that needed canonical scores, for their match or for their place at the cut.
    """

    labels: Int64[Tensor, "chunks chunk"]
    counts: Int64[Tensor, "chunks entries"]
    keys: Float32[Tensor, "chunks entries dim"]
    values: Float32[Tensor, "chunks entries dim_value"] | None
    n_rows: int
    n_scored_rows: int


def compress(
    keys: Float[Tensor, "*lead tokens dim"],
    values: Float[Tensor, "*lead tokens dim_value"] | None,
    *,
    chunk_size: int,
    target: int,
    backend: str = "auto",
) -> CompressedChunks:
    """Each chunk in `target` clusters by chunked soft matching of its keys; centroids of keys and of values, if any.

    The tokens are whole chunks; the chunks of all leading indices come one after the other in the result, whose bits
    are those of `chunked_soft_matching` and `merge` of the reference.
    """
    arrays = [array for array in (keys, values) if array is not None]
    if choose_backend(backend, *arrays) == "triton":
        from .kernels.compress import compress as compress_by_kernels

        four_axes = [with_four_axes(array) for array in arrays]
        return compress_by_kernels(four_axes[0], four_axes[1] if len(arrays) == 2 else None, chunk_size, target)

    dim = keys.shape[-1]
    chunks = [array.reshape(-1, chunk_size, array.shape[-1]) for array in arrays]  # (chunks, chunk, dim)
    together = max(1, WORKING_BYTES // (chunk_size * max(dim, chunk_size) * torch.float64.itemsize))
    parts = [
        compress_together(*(array[first : first + together] for array in chunks), target=target)
        for first in range(0, max(1, len(chunks[0])), together)
    ]
    return CompressedChunks(
        labels=torch.cat([part.labels for part in parts]),
        counts=torch.cat([part.counts for part in parts]),
        keys=torch.cat([part.keys for part in parts]),
        values=None if values is None else torch.cat([part.values for part in parts if part.values is not None]),
        n_rows=sum(part.n_rows for part in parts),
        n_scored_rows=sum(part.n_scored_rows for part in parts),
    )


def compress_together(keys: Tensor, values: Tensor | None = None, *, target: int) -> CompressedChunks:
    """`compress` by torch of so few chunks (chunks, chunk, dim) that all of them fit the working memory."""
    chunks, size, _ = keys.shape
    labels = torch.arange(size, device=keys.device).expand(chunks, size)
    counts = torch.ones_like(labels)
    centroids, keys64, is_exact = keys.float(), keys.double(), sums_are_exact(keys)
    n_rows = n_scored_rows = 0
    while size > target:
        n_merged = min(size // 2, size - target)
        sources, destinations = centroids[:, 0::2], centroids[:, 1::2]  # views, as `alternating_partition` says
        matches = certified_matches(sources, destinations)
        merged = certified_top(matches, sources, destinations, n_merged)  # (chunks, n_merged)
        labels = renumber(matches.destination, merged, size, n_merged).gather(-1, labels)
        n_rows += matches.is_scored.numel()
        n_scored_rows += int(matches.is_scored.sum())
        size -= n_merged
        counts = count_members(labels, size)
        centroids = certified_mean(keys64, is_exact, labels, counts)
    if values is not None:
        values = certified_mean(values.double(), sums_are_exact(values), labels, counts)
    return CompressedChunks(labels, counts, centroids, values, n_rows, n_scored_rows)


def renumber(
    destination: Int64[Tensor, "chunks sources"], best_first: Tensor | None, size: int, n_merged: int
) -> Int64[Tensor, "chunks size"]:
    """New entry of each old entry after a round.

    Parameters
    ----------
    destination : of each source, as an index of the destinations.
    best_first : (chunks, at least n_merged), int64: the sources that merge come first; None where all of them merge.
    """
    sources, destinations = (part.to(destination.device) for part in alternating_partition(size))
    if best_first is None:
        merged, joined = sources.expand(len(destination), -1), destinations[destination]
    else:
        best_first = best_first[:, :n_merged]
        merged, joined = sources[best_first], destinations[destination.gather(-1, best_first)]
    entries = torch.arange(size, device=destination.device).expand(len(destination), size)
    cluster_of_entry = entries.scatter(-1, merged, joined)
    stays = cluster_of_entry == entries  # destinations, and sources that did not merge
    return (stays.cumsum(-1) - 1).gather(-1, cluster_of_entry)  # numbered again, in their old order


def count_members(labels: Int64[Tensor, "chunks chunk"], entries: int) -> Int64[Tensor, "chunks entries"]:
    """Tokens of each entry. Integer additions: exact in any order."""
    counts = torch.zeros(len(labels), entries, dtype=torch.int64, device=labels.device)
    return counts.scatter_add_(-1, labels, torch.ones_like(labels))
