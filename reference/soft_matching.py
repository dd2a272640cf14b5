"""Chunked soft matching: which tokens of a chunk share a cluster.

The method of Chelsea (arXiv:2506.11418v1) and CentroidKV (the same work, revised 2026). From the
papers: the sequence is divided into chunks; inside each chunk the entries are split by an alternating
partition; clusters are found by similarity of keys; each becomes one centroid. Our choices, as the
papers' text was not available to us: cosine similarity of the keys as the cache stores them (after
RoPE), even entries as sources, the most similar `n_merged` matches merge (as in ToMe,
arXiv:2210.09461, the ancestor of the method), rounds until the target, the same target in every chunk.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int64

from .arguments import check_array, check_integer, check_keep_ratio
from .chunks import cluster_chunks
from .merging import Clustering, merge
from .partition import alternating_partition
from .similarity import similarity

__all__ = ["SoftMatching", "chunked_soft_matching", "join"]


@dataclass(frozen=True)
class SoftMatching:
    """The method `chunked_soft_matching` as a value, for a cache (docs/papers.md, Chelsea: which matches merge).

    >>> SoftMatching()
    SoftMatching()
    """

    def cluster(
        self,
        keys: Float[np.ndarray, "*lead tokens dim"],
        values: Float[np.ndarray, "*lead tokens dim_value"],
        *,
        keep_ratio: float,
        chunk_size: int,
    ) -> Clustering:
        """`chunked_soft_matching` of the keys; the values take no part."""
        return chunked_soft_matching(keys, keep_ratio=keep_ratio, chunk_size=chunk_size)


def chunked_soft_matching(
    keys: Float[np.ndarray, "*lead tokens dim"], *, keep_ratio: float, chunk_size: int = 256
) -> Clustering:
    """Each chunk of `chunk_size` tokens in `ceil(keep_ratio * chunk_size)` clusters.

    Parameters
    ----------
    keys : (..., tokens, dim), float16, bfloat16 or float32; tokens may be 0.
    keep_ratio : entries kept / tokens seen, in (0, 1].
    chunk_size : tokens in a chunk, at least 1. A trailing partial chunk is left as it is. 256 as a digest of
        arXiv:2506.11418v1 has it, and the best of the sizes measured here (docs/published.md).

    Returns
    -------
    Clustering : labels (..., tokens) and counts (..., entries); every leading index has the same number of entries.

    Raises
    ------
    ValueError : keep_ratio or chunk_size out of range; keys of a wrong dtype or shape, NaN or infinite.

    Notes
    -----
    One round costs about a quarter of `chunk_size ** 2 * dim` multiply-adds per chunk, so all of it is linear
    in `tokens` (exact counts: theory/complexity, C1 and C4). A round removes at most half of the entries:
    keep_ratio 0.5 takes one, 0.25 two, 0.2 three. Source: docs/papers.md, Chelsea: which matches merge.

    Examples
    --------
    Four keys, two directions. Token 0 is matched with 1 and token 2 with 3, both perfectly; one merge is wanted,
    and of two equal similarities the smaller index wins:

    >>> keys = np.array([[1, 0], [2, 0], [0, 1], [0, 2]], dtype=np.float32)
    >>> chunked_soft_matching(keys, keep_ratio=0.75, chunk_size=4)
    Clustering(labels=array([0, 0, 1, 2]), counts=array([2, 1, 1]))
    >>> chunked_soft_matching(keys, keep_ratio=0.5, chunk_size=4)
    Clustering(labels=array([0, 0, 1, 1]), counts=array([2, 2]))
    """
    keep_ratio = check_keep_ratio(keep_ratio)
    chunk_size = check_integer("chunk_size", chunk_size, least=1)
    check_array("keys", keys)
    return cluster_chunks(match_chunk, keys, alone=keys.shape[:-2], keep_ratio=keep_ratio, chunk_size=chunk_size)


def match_chunk(keys: Float[np.ndarray, "chunk dim"], target: int) -> Int64[np.ndarray, " chunk"]:
    """Labels of one chunk: rounds of matching until `target` entries are left.

    The centroids of a round are means of the original tokens, not of the round before.
    """
    labels = np.arange(len(keys))
    size = len(keys)
    while size > target:
        n_merged = min(size // 2, size - target)
        entry_of_entry = match_round(merge(keys, Clustering(labels, np.bincount(labels))), n_merged)
        labels = entry_of_entry[labels]
        size -= n_merged
    return labels


def match_round(centroids: Float[np.ndarray, "size dim"], n_merged: int) -> Int64[np.ndarray, " size"]:
    """New entry of each old entry after the `n_merged` best matches have merged.

    Of five entries, 0, 2 and 4 look for a destination among 1 and 3. Entry 2 finds 3, exactly; 0 finds 1 and 4 finds
    3, less well. One merge: 2 joins 3. The entries that stay, 0, 1, 3 and 4, are numbered again, and 2 goes with 3:

    >>> match_round(np.array([[3, 1], [1, 0], [0, 1], [0, 2], [1, 3]], dtype=np.float32), n_merged=1)
    array([0, 1, 2, 2, 3])
    """
    sources, destinations = alternating_partition(len(centroids))
    similarities = similarity(centroids[sources], centroids[destinations])  # (sources, destinations)
    destination_of_source = destinations[similarities.argmax(axis=-1)]  # argmax: of ties, the first
    best_first = np.argsort(-similarities.max(axis=-1), kind="stable")  # stable: of ties, the first
    merged = best_first[:n_merged]
    return join(len(centroids), sources[merged], destination_of_source[merged])


def join(
    size: int, sources: Int64[np.ndarray, " merged"], destinations: Int64[np.ndarray, " merged"]
) -> Int64[np.ndarray, " size"]:
    """New entry of each of `size` old ones after each of `sources` has joined the destination at its place."""
    cluster_of_entry = np.arange(size)
    cluster_of_entry[sources] = destinations
    stays = cluster_of_entry == np.arange(size)  # destinations, and sources that did not merge
    return (np.cumsum(stays) - 1)[cluster_of_entry]  # numbered again, in their old order
