"""Chunked soft matching of all chunks at once: matched in rounds, then averaged."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from ..exact.chunks import CompressedChunks, count_members, renumber
from ..exact.mean import certified_mean, sums_are_exact
from ..exact.similarity import certified_matches, certified_top

__all__ = ["WORKING_BYTES", "compress", "match"]

# Chunks are worked on together up to this many bytes in float64, so that they stay in the processor's cache.
WORKING_BYTES = 4 * 2**20


def compress(
    keys: Float[Tensor, "*lead tokens dim"],
    values: Float[Tensor, "*lead tokens dim_value"] | None,
    *,
    chunk_size: int,
    target: int,
) -> CompressedChunks:
    """Each chunk in `target` clusters by chunked soft matching of its keys; centroids of keys and of values, if any.

    The tokens are whole chunks; the chunks of all leading indices come one after the other in the result, whose bits
    are those of `chunked_soft_matching` and `merge` of the reference.
    """
    dim = keys.shape[-1]
    arrays = [array for array in (keys, values) if array is not None]
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


def match(
    keys: Float[Tensor, "*lead tokens dim"], *, chunk_size: int, target: int
) -> tuple[Int64[Tensor, "chunks chunk"], Int64[Tensor, "chunks entries"]]:
    """Labels and counts alone of `compress`."""
    compressed = compress(keys, None, chunk_size=chunk_size, target=target)
    return compressed.labels, compressed.counts


def compress_together(keys: Tensor, values: Tensor | None = None, *, target: int) -> CompressedChunks:
    """`compress` of so few chunks (chunks, chunk, dim) that all of them fit the working memory."""
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
