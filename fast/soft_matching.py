"""Chunked soft matching on torch tensors: the reference's decisions, certified."""

import torch
from jaxtyping import Float
from torch import Tensor

from .arguments import check_array, check_integer, check_keep_ratio, entries_of_chunk
from .chunk_compression import CompressedChunks, compress_chunks
from .merging import Clustering

__all__ = ["chunked_soft_matching", "clustering_of_chunks", "split_chunks"]


def chunked_soft_matching(
    keys: Float[Tensor, "*lead tokens dim"], *, keep_ratio: float, chunk_size: int = 64
) -> Clustering:
    """Each chunk of `chunk_size` tokens in `ceil(keep_ratio * chunk_size)` clusters.

    Defined, with its errors, by `kvcluster.reference.chunked_soft_matching`; the same labels and counts, on the
    device of `keys`.
    """
    check_array("keys", keys)
    check_keep_ratio(keep_ratio)
    check_integer("chunk_size", chunk_size, least=1)
    *lead, tokens, _ = keys.shape
    made = compress_chunks(split_chunks(keys, chunk_size), None, entries_of_chunk(keep_ratio, chunk_size))
    return clustering_of_chunks(made, lead, tokens % chunk_size)


def split_chunks(array: Tensor, chunk_size: int) -> Tensor:
    """The whole chunks of `array` (..., tokens, dim), one after the other: (problems * chunks, chunk, dim)."""
    tokens = array.shape[-2] // chunk_size * chunk_size
    return array[..., :tokens, :].reshape(-1, chunk_size, array.shape[-1])


def clustering_of_chunks(made: CompressedChunks, lead: list[int], rest: int) -> Clustering:
    """The clustering of problems of shape `lead`, each with a trailing chunk of `rest` tokens left as they are."""
    chunk_size, target = made.labels.shape[-1], made.counts.shape[-1]
    chunks = len(made.labels) // max(1, torch.Size(lead).numel())  # of each problem
    first = torch.arange(chunks, device=made.labels.device)[:, None] * target  # first entry of each chunk
    labels = (made.labels.reshape(*lead, chunks, chunk_size) + first).reshape(*lead, chunks * chunk_size)
    counts = made.counts.reshape(*lead, chunks * target)
    tail = torch.arange(rest, device=labels.device).expand(*lead, rest)
    return Clustering(
        labels=torch.cat([labels, chunks * target + tail], dim=-1),
        counts=torch.cat([counts, torch.ones_like(tail)], dim=-1),
    )
