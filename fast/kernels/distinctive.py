"""Distinctive matching of all chunks by kernels: the host waits once, at the end."""

import torch
from torch import Tensor

from ..chunk_compression import CompressedChunks, count_members
from ..distinctive_matching import distinctiveness, evenly_spaced, labels_of, split_by_score
from ..entry_attention import rows_of
from .assign import assign
from .likeness import likeness_to_mean
from .merge import merge

__all__ = ["compress_distinctive"]


def compress_distinctive(
    keys: Tensor, values: Tensor, of_layers: tuple[int, int, int, int], n_exact: int, n_shared: int
) -> CompressedChunks:
    """`kvcluster.fast.distinctive_matching.compress_distinctive` of (batch, heads, tokens, dim) tensors, any strides.

    `of_layers` : layers, heads that share their scores, chunks, tokens of a chunk. Layers and heads are those of all
    batch rows and heads, in their order.
    """
    _, heads, _, chunk_size = of_layers
    likeness = (likeness_to_mean(array, chunk_size).reshape(of_layers) for array in (keys, values))
    exact, ordinary = split_by_score(distinctiveness(*likeness), heads, n_exact)
    rest = rows_of(keys.reshape(-1, chunk_size, keys.shape[-1]), ordinary)
    destinations = evenly_spaced(n_shared, rest.shape[1], rest.device)
    destination, is_scored = assign(rest, rest[:, destinations].float())
    destination[:, destinations] = torch.arange(n_shared, device=rest.device)  # they stay, whatever they are like
    is_scored[:, destinations] = False
    labels = labels_of(exact, ordinary, destination)
    counts = count_members(labels, n_exact + n_shared)
    return CompressedChunks(
        labels=labels,
        counts=counts,
        keys=merge(keys, labels, counts),
        values=merge(values, labels, counts),
        n_rows=len(rest) * (rest.shape[1] - n_shared),
        n_scored_rows=int(is_scored.sum()),
    )
