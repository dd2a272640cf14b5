"""Chunked soft matching of all chunks by kernels: a few launches a round; the host waits once, at the end."""

import torch
from torch import Tensor

from ..arguments import with_four_axes
from ..exact.chunks import CompressedChunks, count_members, renumber
from .match import match
from .merge import merge
from .score import score

__all__ = ["compress", "match_chunks"]


def compress(keys: Tensor, values: Tensor | None, *, chunk_size: int, target: int) -> CompressedChunks:
    """As `kvcluster.fast.plain.soft_matching.compress`, of tensors with any strides."""
    keys, values = with_four_axes(keys), None if values is None else with_four_axes(values)
    batch, heads, tokens, _ = keys.shape
    chunks = batch * heads * (tokens // chunk_size)
    labels = torch.arange(chunk_size, device=keys.device).repeat(chunks, 1)
    counts, centroids, size = torch.ones_like(labels), None, chunk_size
    n_scored = torch.zeros((), dtype=torch.int64, device=keys.device)
    n_rows = 0
    while size > target:
        n_sources, n_merged = (size + 1) // 2, min(size // 2, size - target)
        entries = keys if centroids is None else centroids.reshape(batch, heads, -1, keys.shape[-1])
        destination, is_scored = match(entries, size)
        best_first = None  # all merge
        if n_merged < n_sources:
            best_first = score(entries, size, destination).neg().argsort(dim=-1, stable=True)
        labels = renumber(destination, best_first, size, n_merged).gather(-1, labels)
        n_rows += is_scored.numel()
        n_scored += is_scored.sum()
        size -= n_merged
        counts = count_members(labels, size)
        centroids = merge(keys, labels, counts)
    return CompressedChunks(
        labels=labels,
        counts=counts,
        keys=merge(keys, labels, counts) if centroids is None else centroids,
        values=None if values is None else merge(values, labels, counts),
        n_rows=n_rows,
        n_scored_rows=int(n_scored),
    )


def match_chunks(keys: Tensor, *, chunk_size: int, target: int) -> tuple[Tensor, Tensor]:
    """As `kvcluster.fast.plain.soft_matching.match`."""
    compressed = compress(keys, None, chunk_size=chunk_size, target=target)
    return compressed.labels, compressed.counts
