"""Keeping within a budget: two neighbouring spans of the body become one.

A span is what a chunk became, or two spans that were merged; all spans have the same number of entries. Merging the
two neighbours that cover the fewest tokens is our choice, from no paper. It makes the body coarse where it is old and
leaves it fine where it is young. That stored entries are averaged by their counts is what `pooled_matching` does too.
"""

import itertools

import numpy as np
from jaxtyping import Float, Float32, Int32, Int64

from .soft_matching import match_round

__all__ = ["merge_entries", "merge_stored", "smallest_pair"]


def smallest_pair(spans: list[int]) -> int:
    """Index of the older of the two neighbours with the fewest tokens together; of equal pairs, the oldest.

    `spans` holds at least two numbers, the chunks or tokens of each span, oldest first:

    >>> smallest_pair([4, 2, 1, 2, 1])
    1
    """
    pair_sizes = [older + younger for older, younger in itertools.pairwise(spans)]
    return pair_sizes.index(min(pair_sizes))


def merge_entries(
    keys: Float[np.ndarray, "*lead entries dim"],
    values: Float[np.ndarray, "*lead entries dim_value"],
    counts: Int32[np.ndarray, "*lead entries"],
) -> tuple[
    Float32[np.ndarray, "*lead half dim"], Float32[np.ndarray, "*lead half dim_value"], Int32[np.ndarray, "*lead half"]
]:
    """Keys, values and counts after one round of soft matching in which every source joins its best destination.

    Parameters
    ----------
    keys, values, counts : an even number of entries, as they are stored.

    Notes
    -----
    Costs `entries ** 2 / 4` similarities. Ties as in `chunked_soft_matching`.

    Examples
    --------
    Entry 0 has the direction of 3, entry 2 that of 1. The new key 0 is (3 * 2 + 1 * 6) / 4:

    >>> keys = np.array([[0, 1], [2, 0], [6, 0], [0, 1]], dtype=np.float32)
    >>> merge_entries(keys, keys, np.array([1, 3, 1, 1], dtype=np.int32))[::2]
    (array([[3., 0.],
           [0., 1.]], dtype=float32), array([4, 2], dtype=int32))
    """
    *lead, entries = counts.shape
    labels = np.empty(counts.shape, dtype=np.int64)
    for problem in np.ndindex(*lead):
        labels[problem] = match_round(keys[problem], n_merged=entries // 2)
    return merge_stored(keys, values, counts, labels, entries // 2)


def merge_stored(
    keys: Float[np.ndarray, "*lead entries dim"],
    values: Float[np.ndarray, "*lead entries dim_value"],
    counts: Int32[np.ndarray, "*lead entries"],
    labels: Int64[np.ndarray, "*lead entries"],
    n_left: int,
) -> tuple[
    Float32[np.ndarray, "*lead left dim"], Float32[np.ndarray, "*lead left dim_value"], Int32[np.ndarray, "*lead left"]
]:
    """Keys, values and counts of `n_left` new entries; `labels` (..., entries) says to which each stored one belongs.

    Counts are added; keys and values are means weighted by them, see `weighted_mean`. Every label from 0 to `n_left -
    1` occurs in every leading index.
    """
    lead = counts.shape[:-1]
    new_keys, new_values = (np.empty((*lead, n_left, x.shape[-1]), dtype=np.float32) for x in (keys, values))
    new_counts = np.zeros((*lead, n_left), dtype=np.int32)
    for problem in np.ndindex(*lead):
        np.add.at(new_counts[problem], labels[problem], counts[problem])
        new_keys[problem] = weighted_mean(keys[problem], counts[problem], labels[problem])
        new_values[problem] = weighted_mean(values[problem], counts[problem], labels[problem])
    return new_keys, new_values, new_counts


def weighted_mean(
    array: Float[np.ndarray, "entries dim"],
    counts: Int32[np.ndarray, " entries"],
    labels: Int64[np.ndarray, " entries"],
) -> Float32[np.ndarray, "left dim"]:
    """Mean of each label's entries, weighted by their counts.

    As in `merge` the terms, here `count * entry` in float64, are added in ascending order, starting from -0.0; the sum
    is divided by the total count and rounded once to float32.
    """
    sums = np.full((labels.max() + 1, array.shape[-1]), -0.0)
    totals = np.zeros(len(sums), dtype=np.int64)
    for entry, label in enumerate(labels):
        sums[label] += array[entry].astype(np.float64) * counts[entry]
        totals[label] += counts[entry]
    return (sums / totals[:, None]).astype(np.float32)
