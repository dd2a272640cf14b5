"""Whole heads: KV heads that keep every token beside others that are clustered; a layer then has two rectangles.

As a digest of arXiv:2506.11418v1 by a third party has it, unverified, about 4 % of the heads keep everything ("outlier
heads"), the same ones on any data. How they are told is not known; `kvcluster tune` does it by a rule of ours.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int32

__all__ = ["apart", "together"]


def apart(array: Float[np.ndarray, "*lead tokens dim"], whole_heads: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """The heads that are clustered, and those that stay whole, of (..., heads, tokens, dim).

    >>> apart(np.arange(4.0)[:, None, None], [0, 2])[0].ravel()
    array([1., 3.])
    """
    return np.delete(array, whole_heads, axis=-3), np.take(array, whole_heads, axis=-3)


def together(
    keys: Float[np.ndarray, "*lead others entries dim"],
    values: Float[np.ndarray, "*lead others entries dim_value"],
    counts: Int32[np.ndarray, "*lead others entries"],
    whole_keys: Float[np.ndarray, "*lead whole tokens dim"],
    whole_values: Float[np.ndarray, "*lead whole tokens dim_value"],
    whole_heads: Sequence[int],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Keys, values and counts of all heads in their order, (..., heads, tokens, .): one rectangle of the two.

    It is as long as a whole head, which has no fewer tokens than another one entries. The entries of the heads that are
    clustered come last, after zeros of count 0, which take no part in attention. `whole_heads` ascend.

    >>> one, two = np.ones((1, 1, 1)), np.ones((1, 2, 1))
    >>> together(one, one, np.array([[2]]), two, two, [0])[2]
    array([[1, 1],
           [0, 2]])
    """
    padding = [(0, 0)] * (counts.ndim - 1) + [(whole_keys.shape[-2] - counts.shape[-1], 0)]
    places = np.array(whole_heads) - np.arange(len(whole_heads))  # among the heads that are clustered
    ones = np.ones(whole_keys.shape[:-1], dtype=counts.dtype)
    return (
        np.insert(np.pad(keys, [*padding, (0, 0)]), places, whole_keys, axis=-3),
        np.insert(np.pad(values, [*padding, (0, 0)]), places, whole_values, axis=-3),
        np.insert(np.pad(counts, padding), places, ones, axis=-2),
    )
