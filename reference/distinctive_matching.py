"""Distinctive matching: the distinctive tokens of a chunk stay exact, the ordinary ones share a few centroids.

All of it is our choice; no paper defines it. What led to it, measured in benchmarks/quality/QUALITY.md: chunked soft
matching merges neighbours, whose keys are alike while their values are not, so it blurs the digits of a number first.
A token that a later question may ask for is one that stands out. The mean key and the mean value of a chunk point where
its ordinary tokens do, and the further a token's own key and value point elsewhere, the more it stands out. A token is
kept for all KV heads of a layer or for none, and a moving average over neighbours keeps whole phrases.

That keys unlike the mean key matter is also the idea of KeyDiff (arXiv:2504.15364), which evicts the most alike.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float64, Int64

from .arguments import check_append, check_integer, check_keep_ratio
from .chunks import cluster_chunks
from .merging import Clustering, merge
from .similarity import similarity

__all__ = ["Distinctive", "distinctive_matching", "distinctiveness", "match_ordinary", "numbers_of_entries"]

WINDOW = 7  # tokens of the moving average; odd


@dataclass(frozen=True)
class Distinctive:
    """`distinctive_matching` as a value, for all KV heads of a layer (docs/papers.md, Ours: distinctive matching).

    >>> Distinctive()
    Distinctive(n_shared=4)
    """

    n_shared: int = 4

    def __post_init__(self) -> None:
        object.__setattr__(self, "n_shared", check_integer("n_shared", self.n_shared, least=1))

    def cluster(
        self,
        keys: Float[np.ndarray, "*lead tokens dim"],
        values: Float[np.ndarray, "*lead tokens dim_value"],
        *,
        keep_ratio: float,
        chunk_size: int,
    ) -> Clustering:
        """`distinctive_matching` with this `n_shared`."""
        return distinctive_matching(keys, values, keep_ratio=keep_ratio, chunk_size=chunk_size, n_shared=self.n_shared)


def distinctive_matching(
    keys: Float[np.ndarray, "*lead tokens dim"],
    values: Float[np.ndarray, "*lead tokens dim_value"],
    *,
    keep_ratio: float,
    chunk_size: int = 256,
    n_shared: int = 4,
) -> Clustering:
    """Each chunk of `chunk_size` tokens in `ceil(keep_ratio * chunk_size)` clusters, most of them single tokens.

    Parameters
    ----------
    keys, values : (..., kv_heads, tokens, dim) and (..., kv_heads, tokens, dim_value), float16, bfloat16 or float32;
        tokens may be 0. Without a leading axis they are those of one head.
    keep_ratio : entries kept / tokens seen, in (0, 1].
    chunk_size : tokens in a chunk, at least 1. A trailing partial chunk is left as it is.
    n_shared : entries of a chunk that its ordinary tokens share, at least 1. At most half of the entries are shared,
        but never less than one.

    Returns
    -------
    Clustering : in each chunk first the distinctive tokens in their order, then the shared entries.

    Raises
    ------
    ValueError : a number out of range; keys or values of a wrong dtype or shape, NaN or infinite.

    Notes
    -----
    The ordinary tokens of each head are matched in one round: `n_shared` of them, evenly spaced, are the destinations,
    all others the sources, and all sources merge. Of equally distinctive tokens the first are kept. Costs `3 *
    tokens * (dim + dim_value)` multiply-adds for means, products and norms, and at most `n_shared * tokens * dim` for
    the matching. Source: docs/papers.md, Ours: distinctive matching.

    Examples
    --------
    Tokens that are all alike except for a phrase, 7 to 9. Those whose neighbourhood stands out most are kept:

    >>> keys = np.tile(np.float32([1, 0]), (16, 1))
    >>> keys[7:10] = [0, 1]
    >>> clustering = distinctive_matching(keys, keys, keep_ratio=0.375, chunk_size=16, n_shared=1)
    >>> clustering.labels
    array([5, 5, 5, 5, 5, 5, 0, 1, 2, 3, 4, 5, 5, 5, 5, 5])
    >>> clustering.counts
    array([ 1,  1,  1,  1,  1, 11])
    """
    check_append(keys, values, (None, None))
    keep_ratio = check_keep_ratio(keep_ratio)
    chunk_size = check_integer("chunk_size", chunk_size, least=1)
    n_shared = check_integer("n_shared", n_shared, least=1)

    def match(keys: np.ndarray, values: np.ndarray, target: int) -> np.ndarray:
        return match_distinctive(keys, values, target, n_shared)

    layers = keys.shape[:-3]
    return cluster_chunks(match, keys, values, alone=layers, keep_ratio=keep_ratio, chunk_size=chunk_size)


def match_distinctive(keys: np.ndarray, values: np.ndarray, target: int, n_shared: int) -> Int64[np.ndarray, "..."]:
    """Labels (kv_heads, chunk) of one chunk (kv_heads, chunk, dim); there may be no axis of heads."""
    *heads, size, _ = keys.shape
    if target == size:
        return np.broadcast_to(np.arange(size), (*heads, size))
    n_exact, n_shared = numbers_of_entries(target, n_shared)
    exact = np.argsort(-distinctiveness(keys, values), kind="stable")[:n_exact]  # stable: of ties, the first
    labels = np.empty((*heads, size), dtype=np.int64)
    for head in np.ndindex(*heads):
        labels[head] = match_ordinary(keys[head], exact, n_shared)
    return labels


def numbers_of_entries(target: int, n_shared: int) -> tuple[int, int]:
    """Of the `target` entries of a chunk, how many are exact and how many are shared."""
    n_shared = max(1, min(n_shared, target // 2))
    return target - n_shared, n_shared


def match_ordinary(
    keys: Float[np.ndarray, "chunk dim"], exact: Int64[np.ndarray, " exact"], n_shared: int
) -> Int64[np.ndarray, " chunk"]:
    """Labels of one head's chunk: the tokens `exact`, in their order, then entries that all others share."""
    labels = np.empty(len(keys), dtype=np.int64)
    labels[np.sort(exact)] = np.arange(len(exact))
    ordinary = np.setdiff1d(np.arange(len(keys)), exact)
    destinations = np.arange(n_shared) * len(ordinary) // n_shared  # evenly spaced, the first included
    match = similarity(keys[ordinary], keys[ordinary][destinations]).argmax(axis=-1)  # argmax: of ties, the first
    match[destinations] = np.arange(n_shared)  # a destination stays, even if an equal one comes before it
    labels[ordinary] = len(exact) + match
    return labels


def distinctiveness(
    keys: Float[np.ndarray, "*heads chunk dim"], values: Float[np.ndarray, "*heads chunk dim_value"]
) -> Float64[np.ndarray, " chunk"]:
    """How far each token points away from the mean of its chunk: added over the heads, averaged over neighbours.

    Each head adds `2 - similarity(key, mean key) - similarity(value, mean value)`, the heads in their order. Then the
    tokens of a window of 7 are added in theirs and divided by their number, which is smaller near the chunk's ends.

    >>> keys = np.float32([[1, 0], [1, 0], [1, 0], [-1, 0]])
    >>> distinctiveness(keys, keys)  # 0, 0, 0 and 4, averaged over up to three neighbours on each side
    array([1., 1., 1., 1.])
    """
    *heads, size, _ = keys.shape
    total = np.zeros(size)
    for head in np.ndindex(*heads):
        total = total + (2.0 - likeness_to_mean(keys[head]) - likeness_to_mean(values[head]))
    reach = WINDOW // 2
    padded = np.pad(total, reach)
    inside = np.pad(np.ones(size), reach)
    sums, numbers = np.zeros(size), np.zeros(size)
    for offset in range(WINDOW):
        sums, numbers = sums + padded[offset : offset + size], numbers + inside[offset : offset + size]
    return sums / numbers


def likeness_to_mean(array: Float[np.ndarray, "chunk dim"]) -> Float64[np.ndarray, " chunk"]:
    """Similarity of each token to the centroid of all of them."""
    size = len(array)
    mean = merge(array, Clustering(np.zeros(size, dtype=np.int64), np.array([size])))  # (1, dim)
    return similarity(array.astype(np.float32), mean)[:, 0]
