"""Neighbour merging on torch tensors. The worked example of CONTRIBUTING.md."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from .arguments import check_array
from .backends import AnyBackend, choose
from .exact.chunks import CompressedChunks, clustering_of_chunks, count_members
from .exact.mean import ordered_mean
from .merging import Clustering
from .scalars import check_integer, check_keep_ratio, entries_of_chunk

__all__ = ["Neighbours", "neighbour_merging"]


@dataclass(frozen=True)
class Neighbours:
    """`neighbour_merging` as the method of a cache: as in `kvcluster.reference.Neighbours`."""

    def compress(
        self, keys: Tensor, values: Tensor, *, chunk_size: int, target: int, backend: AnyBackend = "auto"
    ) -> CompressedChunks:
        """Whole chunks in `target` clusters. Means by torch on every device: a kernel would be a row of the table."""
        chunks = [array.reshape(-1, chunk_size, array.shape[-1]) for array in (keys, values)]  # (chunks, chunk, dim)
        runs = torch.arange(chunk_size, device=keys.device) * target // chunk_size
        labels = runs.repeat(len(chunks[0]), 1)
        counts = count_members(labels, target)
        means = [ordered_mean(array, labels, counts) for array in chunks]
        return CompressedChunks(labels, counts, means[0], means[1], n_rows=labels.numel(), n_scored_rows=0)


def neighbour_merging(
    keys: Float[Tensor, "*lead tokens dim"], *, keep_ratio: float, chunk_size: int = 64, backend: AnyBackend = "auto"
) -> Clustering:
    """Each chunk in runs of neighbours; defined, with its errors, by `kvcluster.reference.neighbour_merging`."""
    check_array("keys", keys)
    keep_ratio = check_keep_ratio(keep_ratio)
    chunk_size = check_integer("chunk_size", chunk_size, least=1)
    choose("merge", backend, keys)
    *lead, tokens, _ = keys.shape
    body = tokens // chunk_size * chunk_size
    whole = keys[..., :body, :]
    target = entries_of_chunk(keep_ratio, chunk_size)
    compressed = Neighbours().compress(whole, whole, chunk_size=chunk_size, target=target)
    return Clustering(*clustering_of_chunks(compressed, lead, body, tokens - body))
