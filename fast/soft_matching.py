"""Chunked soft matching on torch tensors: all chunks of all heads together, the reference's decisions."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from .arguments import check_array, check_integer, check_keep_ratio, entries_of_chunk
from .exact_similarity import canonical_similarity
from .merging import Clustering, ordered_mean
from .partition import alternating_partition

__all__ = ["chunked_soft_matching"]

# Chunks are matched together as long as their similarities' terms need no more than this.
WORKING_BYTES = 64 * 2**20


def chunked_soft_matching(
    keys: Float[Tensor, "*lead tokens dim"], *, keep_ratio: float, chunk_size: int = 64
) -> Clustering:
    """Each chunk of `chunk_size` tokens in `ceil(keep_ratio * chunk_size)` clusters.

    Defined, with its errors, by `kvcluster.reference.chunked_soft_matching`; the same labels and counts, on the
    device of `keys`. Needs at most about 200 MiB beside its result, or one chunk's terms where these are more.
    """
    check_array("keys", keys)
    check_keep_ratio(keep_ratio)
    check_integer("chunk_size", chunk_size, least=1)
    *lead, tokens, dim = keys.shape
    target = entries_of_chunk(keep_ratio, chunk_size)
    chunks = tokens // chunk_size
    rest = tokens - chunks * chunk_size

    body = keys[..., : chunks * chunk_size, :].reshape(-1, chunk_size, dim)  # (problems * chunks, chunk, dim)
    terms = ((chunk_size + 1) // 2) ** 2 * dim * torch.float64.itemsize
    together = max(1, WORKING_BYTES // terms)
    matched = [match_chunks(part, target) for part in body.split(together)] if len(body) else []
    labels = torch.cat(matched) if matched else torch.empty(0, chunk_size, dtype=torch.int64, device=keys.device)
    counts = count_members(labels, target)  # (problems * chunks, target)

    first = torch.arange(chunks, device=keys.device)[:, None] * target  # first entry of each chunk
    labels = (labels.reshape(*lead, chunks, chunk_size) + first).reshape(*lead, chunks * chunk_size)
    tail = torch.arange(rest, device=keys.device).expand(*lead, rest)
    return Clustering(
        labels=torch.cat([labels, chunks * target + tail], dim=-1),
        counts=torch.cat([counts.reshape(*lead, chunks * target), torch.ones_like(tail)], dim=-1),
    )


def match_chunks(keys: Float[Tensor, "chunks chunk dim"], target: int) -> Int64[Tensor, "chunks chunk"]:
    """Labels of each chunk: rounds of matching until `target` entries are left."""
    chunks, size, _ = keys.shape
    labels = torch.arange(size, device=keys.device).expand(chunks, size)
    while size > target:
        n_merged = min(size // 2, size - target)
        centroids = ordered_mean(keys, labels, count_members(labels, size))
        labels = match_round(centroids, n_merged).gather(-1, labels)
        size -= n_merged
    return labels


def match_round(centroids: Float[Tensor, "chunks size dim"], n_merged: int) -> Int64[Tensor, "chunks size"]:
    """New entry of each old entry after the `n_merged` best matches of each chunk have merged."""
    chunks, size, _ = centroids.shape
    sources, destinations = (part.to(centroids.device) for part in alternating_partition(size))
    best, match = canonical_similarity(centroids[:, sources], centroids[:, destinations]).max(dim=-1)
    merged = best.neg().argsort(dim=-1, stable=True)[:, :n_merged]  # (chunks, n_merged)

    entries = torch.arange(size, device=centroids.device).expand(chunks, size)
    cluster_of_entry = entries.scatter(-1, sources[merged], destinations[match.gather(-1, merged)])
    stays = cluster_of_entry == entries  # destinations, and sources that did not merge
    return (stays.cumsum(-1) - 1).gather(-1, cluster_of_entry)  # numbered again, in their old order


def count_members(labels: Int64[Tensor, "chunks chunk"], entries: int) -> Int64[Tensor, "chunks entries"]:
    """Tokens of each entry. Integer additions: exact in any order."""
    counts = torch.zeros(len(labels), entries, dtype=torch.int64, device=labels.device)
    return counts.scatter_add_(-1, labels, torch.ones_like(labels))
