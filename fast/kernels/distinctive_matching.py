"""Distinctive matching of all chunks by kernels: the host waits once, at the end of each call."""

import torch
from torch import Tensor

from ..arguments import with_four_axes
from ..exact.chunks import CompressedChunks, count_members
from ..exact.distinctiveness import (
    distinctiveness,
    evenly_spaced,
    labels_of,
    numbers_of_entries,
    shape_of_layers,
    split_by_score,
)
from ..exact.entries import rows_of
from .assign import assign
from .likeness import likeness_to_mean
from .merge import merge

__all__ = ["compress", "scores"]


def scores(keys: Tensor, values: Tensor, chunk_size: int) -> Tensor:
    """As `kvcluster.fast.plain.distinctive_matching.scores`."""
    shape = shape_of_layers(keys, chunk_size)
    return distinctiveness(
        *(likeness_to_mean(with_four_axes(array), chunk_size).reshape(shape) for array in (keys, values))
    )


def compress(scores: Tensor, keys: Tensor, values: Tensor, *, target: int, n_shared: int) -> CompressedChunks:
    """As `kvcluster.fast.plain.distinctive_matching.compress`."""
    _, heads, _, chunk_size = shape_of_layers(keys, scores.shape[-1])
    n_exact, n_shared = numbers_of_entries(target, n_shared)
    keys, values = with_four_axes(keys), with_four_axes(values)
    exact, ordinary = split_by_score(scores, heads, n_exact)
    ordinary_keys = rows_of(keys.reshape(-1, chunk_size, keys.shape[-1]), ordinary)
    destinations = evenly_spaced(n_shared, ordinary_keys.shape[1], keys.device)
    destination, is_scored = assign(ordinary_keys, ordinary_keys[:, destinations].float())
    destination[:, destinations] = torch.arange(n_shared, device=keys.device)  # they stay, whatever they are like
    is_scored[:, destinations] = False
    labels = labels_of(exact, ordinary, destination)
    counts = count_members(labels, target)
    return CompressedChunks(
        labels=labels,
        counts=counts,
        keys=merge(keys, labels, counts),
        values=merge(values, labels, counts),
        n_rows=len(ordinary_keys) * (ordinary_keys.shape[1] - n_shared),
        n_scored_rows=int(is_scored.sum()),
    )
