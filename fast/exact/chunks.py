"""What becomes of chunks of tokens, whichever method clustered them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float32, Int64
from torch import Tensor

__all__ = [
    "CompressedChunks",
    "Heads",
    "HeadsOfTarget",
    "all_heads",
    "alternating_halves",
    "cluster_chunks",
    "clustering_of_chunks",
    "count_members",
    "join",
    "numbered_through",
    "of_heads",
    "renumber",
]

Heads = list[int]  # indices of the last leading axis, ascending
HeadsOfTarget = dict[int, Heads]  # which heads become so many entries in each chunk


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


def cluster_chunks(
    compress: Callable[..., CompressedChunks], keys: Tensor, values: Tensor, *, chunk_size: int, target: int
) -> tuple[Int64[Tensor, "*lead tokens"], Int64[Tensor, "*lead entries"]]:
    """Labels and counts of all tokens: whole chunks by `compress`, which is given `chunk_size` and `target` too.

    A trailing partial chunk is left as it is, and so are all tokens where chunks become no fewer entries.
    """
    *lead, tokens, _ = keys.shape
    body = tokens // chunk_size * chunk_size
    if target == chunk_size or body == 0:
        labels = torch.arange(tokens, device=keys.device).expand(*lead, tokens).contiguous()
        return labels, torch.ones_like(labels)
    in_chunks = (array[..., :body, :].detach() for array in (keys, values))
    return clustering_of_chunks(compress(*in_chunks, chunk_size=chunk_size, target=target), lead, body, tokens - body)


def clustering_of_chunks(
    compressed: CompressedChunks, lead: list[int], body: int, n_trailing: int
) -> tuple[Int64[Tensor, "*lead tokens"], Int64[Tensor, "*lead entries"]]:
    """Labels and counts of problems of shape `lead`: `body` tokens in whole chunks, then `n_trailing` as they are."""
    return numbered_through(compressed.labels, compressed.counts, lead, body, n_trailing)


def numbered_through(
    labels: Int64[Tensor, "chunks chunk"],
    counts: Int64[Tensor, "chunks target"],
    lead: list[int],
    body: int,
    n_trailing: int,
) -> tuple[Int64[Tensor, "*lead tokens"], Int64[Tensor, "*lead entries"]]:
    """As `clustering_of_chunks`, of the labels and counts of each chunk."""
    chunk_size, target = labels.shape[-1], counts.shape[-1]
    chunks = body // chunk_size  # of each problem
    first = torch.arange(chunks, device=labels.device)[:, None] * target  # first entry of each chunk
    labels = (labels.reshape(*lead, chunks, chunk_size) + first).reshape(*lead, body)
    counts = counts.reshape(*lead, chunks * target)
    tail = torch.arange(n_trailing, device=labels.device).expand(*lead, n_trailing)
    return torch.cat([labels, chunks * target + tail], dim=-1), torch.cat([counts, torch.ones_like(tail)], dim=-1)


def all_heads(keys: Tensor) -> Heads:
    """The heads of keys (..., heads, tokens, dim); without an axis of heads there is one."""
    return list(range(keys.shape[-3] if keys.ndim > 2 else 1))


def of_heads(heads: Heads, *arrays: Tensor) -> tuple[Tensor, ...]:
    """The arrays (..., heads, tokens, dim) of these heads alone, copied if these are not all."""
    if arrays[0].ndim < 3 or len(heads) == arrays[0].shape[-3]:
        return arrays
    return tuple(array.index_select(-3, torch.tensor(heads, device=array.device)) for array in arrays)


def alternating_halves(size: int) -> tuple[Int64[Tensor, " sources"], Int64[Tensor, " destinations"]]:
    """Entries 0, 2, ... as sources and 1, 3, ... as destinations."""
    entries = torch.arange(size, device="cpu")
    return entries[0::2], entries[1::2]


def renumber(
    destination: Int64[Tensor, "chunks sources"], best_first: Tensor | None, size: int, n_merged: int
) -> Int64[Tensor, "chunks size"]:
    """New entry of each old entry after a round.

    Parameters
    ----------
    destination : of each source, as an index of the destinations.
    best_first : (chunks, at least n_merged), int64: the sources that merge come first; None where all of them merge.
    """
    sources, destinations = (part.to(destination.device) for part in alternating_halves(size))
    if best_first is None:
        return join(size, sources.expand(len(destination), -1), destinations[destination])
    best_first = best_first[:, :n_merged]
    return join(size, sources[best_first], destinations[destination.gather(-1, best_first)])


def join(
    size: int, sources: Int64[Tensor, "chunks merged"], destinations: Int64[Tensor, "chunks merged"]
) -> Int64[Tensor, "chunks size"]:
    """New entry of each of `size` old ones after each of `sources` has joined the destination at its place."""
    entries = torch.arange(size, device=sources.device).expand(len(sources), size)
    cluster_of_entry = entries.scatter(-1, sources, destinations)
    stays = cluster_of_entry == entries  # destinations, and sources that did not merge
    return (stays.cumsum(-1) - 1).gather(-1, cluster_of_entry)  # numbered again, in their old order


def count_members(labels: Int64[Tensor, "chunks chunk"], entries: int) -> Int64[Tensor, "chunks entries"]:
    """Tokens of each entry. Integer additions: exact in any order."""
    counts = torch.zeros(len(labels), entries, dtype=torch.int64, device=labels.device)
    return counts.scatter_add_(-1, labels, torch.ones_like(labels))
