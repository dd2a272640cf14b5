"""The baseline: chunked soft matching in plain float32 torch, as most people would write it. It certifies nothing.

Cosines are products of normalised keys in float32, so near ties fall as rounding has it, and a sum may be added in
any order. On random keys it decides as `kvcluster` does; on ties, on huge and on tiny keys it need not.
Imports torch alone, so that `benchmarks/gpu` can use it anywhere.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

__all__ = ["plain_compress", "plain_compress_tiled"]


def plain_compress(keys: Tensor, chunk_size: int, target: int) -> tuple[Tensor, Tensor, Tensor]:
    """Labels (chunks, chunk), counts (chunks, target) and centroids (chunks, target, dim) of keys (..., tokens, dim).

    All chunks at once. Rounds go on from float32 centroids, each weighted by its count.
    """
    centroids = keys.reshape(-1, chunk_size, keys.shape[-1]).float()  # (chunks, chunk, dim)
    chunks, size = centroids.shape[:2]
    labels = torch.arange(size, device=keys.device).expand(chunks, size)
    counts = torch.ones(chunks, size, device=keys.device)
    while size > target:
        n_merged = min(size // 2, size - target)
        unit = normalize(centroids, dim=-1)
        best, destination = torch.bmm(unit[:, 0::2], unit[:, 1::2].mT).max(dim=-1)  # (chunks, sources)
        source = best.topk(n_merged).indices  # (chunks, n_merged)
        entry = entries_after(size, 2 * source, 2 * destination.gather(-1, source) + 1)
        labels = entry.gather(-1, labels)
        size -= n_merged
        centroids, counts = weighted_means(centroids, counts, entry, size)
    return labels, counts.long(), centroids


def entries_after(size: int, merged: Tensor, joined: Tensor) -> Tensor:
    """New entry (chunks, size) of each old one, where the entries `merged` join the entries `joined`."""
    old = torch.arange(size, device=merged.device).repeat(len(merged), 1)
    cluster = old.scatter(-1, merged, joined)
    return ((cluster == old).cumsum(-1) - 1).gather(-1, cluster)


def weighted_means(centroids: Tensor, counts: Tensor, entry: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Centroids (chunks, size, dim) and counts of the new entries."""
    chunks, _, dim = centroids.shape
    counts_after = torch.zeros(chunks, size, device=counts.device).scatter_add_(1, entry, counts)
    row = entry + torch.arange(chunks, device=entry.device)[:, None] * size
    sums = torch.zeros(chunks * size, dim, device=counts.device)
    sums.index_add_(0, row.reshape(-1), (centroids * counts[..., None]).reshape(-1, dim))
    return sums.reshape(chunks, size, dim) / counts_after[..., None], counts_after


def plain_compress_tiled(keys: Tensor, chunk_size: int, target: int, tile: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """The same, `tile` chunks at a time: less memory, and a processor's cache is used better."""
    chunks = keys.reshape(-1, chunk_size, keys.shape[-1])
    parts = [plain_compress(chunks[i : i + tile], chunk_size, target) for i in range(0, len(chunks), tile)]
    labels, counts, centroids = (torch.cat(part) for part in zip(*parts, strict=True))
    return labels, counts, centroids
