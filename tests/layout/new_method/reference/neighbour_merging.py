"""Neighbour merging: neighbours share an entry, whatever they are like. The worked example of CONTRIBUTING.md."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from .arguments import check_array, check_integer, check_keep_ratio
from .chunks import cluster_chunks
from .merging import Clustering

__all__ = ["Neighbours", "neighbour_merging"]


@dataclass(frozen=True)
class Neighbours:
    """`neighbour_merging` as the method of a cache."""

    def cluster(self, keys: np.ndarray, values: np.ndarray, *, keep_ratio: float, chunk_size: int) -> Clustering:
        """The clustering of the keys."""
        return neighbour_merging(keys, keep_ratio=keep_ratio, chunk_size=chunk_size)


def neighbour_merging(
    keys: Float[np.ndarray, "*lead tokens dim"], *, keep_ratio: float, chunk_size: int = 64
) -> Clustering:
    """Each chunk of `chunk_size` tokens in `ceil(keep_ratio * chunk_size)` runs of neighbours, as equal as can be.

    >>> keys = np.ones((5, 1), dtype=np.float32)
    >>> neighbour_merging(keys, keep_ratio=0.5, chunk_size=4)
    Clustering(labels=array([0, 0, 1, 1, 2]), counts=array([2, 2, 1]))
    """
    check_array("keys", keys)
    keep_ratio = check_keep_ratio(keep_ratio)
    chunk_size = check_integer("chunk_size", chunk_size, least=1)
    return cluster_chunks(runs, keys, alone=keys.shape[:-2], keep_ratio=keep_ratio, chunk_size=chunk_size)


def runs(keys: Float[np.ndarray, "chunk dim"], target: int) -> np.ndarray:
    """The run of each token of one chunk, (chunk,)."""
    return np.arange(len(keys)) * target // len(keys)
