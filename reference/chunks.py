"""Chunks: spans of equal length, each clustered alone into the same number of entries."""

import math
from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int64

from .merging import Clustering

__all__ = ["cluster_chunks", "entries_of_chunk"]


def entries_of_chunk(keep_ratio: float, chunk_size: int) -> int:
    """Entries that a chunk of `chunk_size` tokens becomes, its target: `ceil(keep_ratio * chunk_size)`.

    The product is taken in float64, so every language with IEEE arithmetic gets the same number.
    """
    return math.ceil(float(keep_ratio) * int(chunk_size))


def cluster_chunks(
    match: Callable[..., Int64[np.ndarray, "*joint chunk"]],
    *arrays: Float[np.ndarray, "*lead tokens dim"],
    alone: tuple[int, ...],
    keep_ratio: float,
    chunk_size: int,
) -> Clustering:
    """Every chunk clustered by `match`, the tokens of a trailing partial chunk left as they are.

    Parameters
    ----------
    match : given the tokens of one chunk, (..., chunk, dim) of each array, and the target; returns the entry of each
        token, (..., chunk), from 0 to target - 1.
    arrays : what `match` decides by, keys or keys and values.
    alone : sizes of the first leading axes, in which every index is a problem of its own; `match` gets the other
        leading axes together.
    keep_ratio, chunk_size : the target is that of `entries_of_chunk`.

    Examples
    --------
    Chunks of three tokens; all but the first token of a chunk share its second entry. Token 6 is in no whole chunk:

    >>> keys = np.zeros((7, 1), dtype=np.float32)
    >>> cluster_chunks(lambda chunk, target: np.array([0, 1, 1]), keys, alone=(), keep_ratio=0.5, chunk_size=3)
    Clustering(labels=array([0, 1, 1, 2, 3, 3, 4]), counts=array([1, 2, 1, 2, 1]))
    """
    *lead, tokens, _ = arrays[0].shape
    target = entries_of_chunk(keep_ratio, chunk_size)
    chunks = tokens // chunk_size
    n_trailing = tokens - chunks * chunk_size

    labels = np.empty((*lead, tokens), dtype=np.int64)
    for problem in np.ndindex(*alone):
        for chunk in range(chunks):
            span = slice(chunk * chunk_size, (chunk + 1) * chunk_size)
            chunk_arrays = (array[problem][..., span, :] for array in arrays)
            labels[problem][..., span] = chunk * target + match(*chunk_arrays, target)
    labels[..., tokens - n_trailing :] = chunks * target + np.arange(n_trailing)

    counts = np.empty((*lead, chunks * target + n_trailing), dtype=np.int64)
    for problem in np.ndindex(*lead):
        counts[problem] = np.bincount(labels[problem], minlength=counts.shape[-1])
    return Clustering(labels, counts)
