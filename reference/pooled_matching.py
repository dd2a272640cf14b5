"""Pooled matching: soft matching in which all chunks of a head compete for the merges.

As a digest of arXiv:2506.11418v1 by a third party has it, unverified: matches of all chunks are pooled and the least
similar are pruned, not an equal number in each chunk; a step at most halves the entries, so several steps lead to the
target; keys and values are averaged by degree, which is the number of tokens of an entry.

Our choices, as the paper's text was not available to us: even entries as sources, similarity of keys as they are stored
(after RoPE), chunks of equally many *entries* that are cut anew in every step, a last chunk that may be shorter and
takes part, and as many merges in every head.
"""

import numpy as np
from jaxtyping import Float, Float32, Int32, Int64

from .partition import alternating_partition
from .similarity import similarity
from .soft_matching import join
from .span_merging import merge_stored

__all__ = ["compress_entries", "pooled_round"]


def compress_entries(
    keys: Float[np.ndarray, "*lead entries dim"],
    values: Float[np.ndarray, "*lead entries dim_value"],
    counts: Int32[np.ndarray, "*lead entries"],
    *,
    target: int,
    chunk_size: int,
) -> tuple[
    Float32[np.ndarray, "*lead left dim"], Float32[np.ndarray, "*lead left dim_value"], Int32[np.ndarray, "*lead left"]
]:
    """Keys, values and counts after steps of pooled matching, until every head has `target` entries.

    Parameters
    ----------
    keys, values, counts : entries as they are stored; each leading index is a head of its own.
    target : at least 1; with no more entries than that they stay as they are.
    chunk_size : entries of a chunk, at least 2.

    Notes
    -----
    A step takes away `min(floor(entries / 2), entries - target)` entries. Their new keys and values are means of those
    before the step, weighted by counts, and are rounded to float32 in every step. Costs about `entries * chunk_size *
    dim / 4` multiply-adds in the first step, and about twice that in all, since entries halve (theory/complexity, C1).

    Examples
    --------
    Two chunks of two entries and one merge to make. The second pair is more alike, so the first chunk stays as it is:

    >>> keys = np.array([[1, 0], [1, 1], [0, 2], [0, 1]], dtype=np.float32)
    >>> compress_entries(keys, keys, np.array([1, 1, 1, 3], dtype=np.int32), target=3, chunk_size=2)[::2]
    (array([[1.  , 0.  ],
           [1.  , 1.  ],
           [0.  , 1.25]], dtype=float32), array([1, 1, 4], dtype=int32))
    """
    keys, values = keys.astype(np.float32), values.astype(np.float32)
    while counts.shape[-1] > target:
        size = counts.shape[-1]
        n_merged = min(size // 2, size - target)
        labels = np.empty(counts.shape, dtype=np.int64)
        for head in np.ndindex(*counts.shape[:-1]):
            labels[head] = pooled_round(keys[head], n_merged, chunk_size)
        keys, values, counts = merge_stored(keys, values, counts, labels, size - n_merged)
    return keys, values, counts


def pooled_round(
    centroids: Float[np.ndarray, "size dim"], n_merged: int, chunk_size: int
) -> Int64[np.ndarray, " size"]:
    """New entry of each old entry after the `n_merged` best matches of all chunks have merged; of ties, the first.

    With one chunk it is `match_round`. In chunks of two, entry 0 finds 1, entry 2 finds 3, exactly; entry 4 is alone:

    >>> pooled_round(np.array([[3, 1], [1, 0], [0, 1], [0, 2], [1, 3]], dtype=np.float32), n_merged=1, chunk_size=2)
    array([0, 1, 2, 2, 3])
    """
    sources, destinations, similarities = [], [], []  # of each match, chunk after chunk
    for first in range(0, len(centroids) - 1, chunk_size):  # an entry alone in the last chunk finds none
        chunk = centroids[first : first + chunk_size]
        chunk_sources, chunk_destinations = alternating_partition(len(chunk))
        similar = similarity(chunk[chunk_sources], chunk[chunk_destinations])  # (sources, destinations)
        sources.append(first + chunk_sources)
        destinations.append(first + chunk_destinations[similar.argmax(axis=-1)])  # argmax: of ties, the first
        similarities.append(similar.max(axis=-1))
    best_first = np.argsort(-np.concatenate(similarities), kind="stable")  # stable: of ties, the first
    merged = best_first[:n_merged]
    return join(len(centroids), np.concatenate(sources)[merged], np.concatenate(destinations)[merged])
