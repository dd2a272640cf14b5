"""All chunks at once: matched in rounds, then averaged. The work behind `chunked_soft_matching` and the cache."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from .exact_mean import certified_mean, sums_are_exact
from .exact_similarity import certified_matches, certified_top
from .partition import alternating_partition

__all__ = ["CompressedChunks", "compress_chunks"]

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


def compress_chunks(
    keys: Float[Tensor, "chunks chunk dim"], values: Float[Tensor, "chunks chunk dim_value"] | None, target: int
) -> CompressedChunks:
    """Each chunk in `target` clusters by chunked soft matching of its keys; centroids of keys and of values, if any.

    The bits are those of `chunked_soft_matching` and `merge` of the reference. Works on a few MiB at a time.
    """
    chunks, size, dim = keys.shape
    together = max(1, WORKING_BYTES // (size * max(dim, size) * torch.float64.itemsize))
    starts = range(0, max(1, chunks), together)
    parts = [
        compress_together(keys[i : i + together], None if values is None else values[i : i + together], target)
        for i in starts
    ]
    return CompressedChunks(
        *(torch.cat([getattr(part, name) for part in parts]) for name in ("labels", "counts", "keys")),
        values=None if values is None else torch.cat([part.values for part in parts]),
        n_rows=sum(part.n_rows for part in parts),
        n_scored_rows=sum(part.n_scored_rows for part in parts),
    )


def compress_together(keys: Tensor, values: Tensor | None, target: int) -> CompressedChunks:
    """`compress_chunks` of so few chunks that all of them fit the working memory."""
    chunks, size, _ = keys.shape
    labels = torch.arange(size, device=keys.device).expand(chunks, size)
    counts = torch.ones_like(labels)
    centroids, keys64, is_exact = keys.float(), keys.double(), sums_are_exact(keys)
    n_rows = n_scored_rows = 0
    while size > target:
        n_merged = min(size // 2, size - target)
        entry_of_entry, is_scored = match_round(centroids, n_merged)
        n_rows += is_scored.numel()
        n_scored_rows += int(is_scored.sum())
        size -= n_merged
        labels = entry_of_entry.gather(-1, labels)
        counts = count_members(labels, size)
        centroids = certified_mean(keys64, is_exact, labels, counts)
    if values is not None:
        values = certified_mean(values.double(), sums_are_exact(values), labels, counts)
    return CompressedChunks(labels, counts, centroids, values, n_rows, n_scored_rows)


def match_round(centroids: Float32[Tensor, "chunks size dim"], n_merged: int) -> tuple[Tensor, Tensor]:
    """New entry of each old entry (chunks, size) after the `n_merged` best matches, and which sources were scored."""
    chunks, size, _ = centroids.shape
    sources, destinations = (part.to(centroids.device) for part in alternating_partition(size))
    source_keys, destination_keys = centroids[:, sources], centroids[:, destinations]
    matches = certified_matches(source_keys, destination_keys)
    merged = certified_top(matches, source_keys, destination_keys, n_merged)  # (chunks, n_merged)

    entries = torch.arange(size, device=centroids.device).expand(chunks, size)
    cluster_of_entry = entries.scatter(-1, sources[merged], destinations[matches.destination.gather(-1, merged)])
    stays = cluster_of_entry == entries  # destinations, and sources that did not merge
    return (stays.cumsum(-1) - 1).gather(-1, cluster_of_entry), matches.is_scored  # numbered again, in their old order


def count_members(labels: Int64[Tensor, "chunks chunk"], entries: int) -> Int64[Tensor, "chunks entries"]:
    """Tokens of each entry. Integer additions: exact in any order."""
    counts = torch.zeros(len(labels), entries, dtype=torch.int64, device=labels.device)
    return counts.scatter_add_(-1, labels, torch.ones_like(labels))
