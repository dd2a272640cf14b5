"""Merging: each cluster of tokens becomes one centroid. Decided once (a `Clustering`), applied to keys and values."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float32, Int64

from .arguments import check_array, check_clustering

__all__ = ["Clustering", "merge"]


@dataclass(frozen=True, eq=False)
class Clustering:
    """Which entry each token belongs to (docs/papers.md, Chelsea: which matches merge).

    Attributes
    ----------
    labels : (..., tokens), int64: entry of each token, from 0 to entries - 1.
    counts : (..., entries), int64: tokens of each entry, all at least 1; they sum to `tokens`.
    """

    labels: Int64[np.ndarray, "*lead tokens"]
    counts: Int64[np.ndarray, "*lead entries"]


def merge(
    array: Float[np.ndarray, "*lead tokens dim"], clustering: Clustering
) -> Float32[np.ndarray, "*lead entries dim"]:
    """The mean of each cluster's tokens.

    Parameters
    ----------
    array : (..., tokens, dim), float16, bfloat16 or float32: keys or values.
    clustering : labels (..., tokens) and counts (..., entries), leading axes as in `array`.

    Returns
    -------
    (..., entries, dim), float32.

    Raises
    ------
    ValueError : wrong dtype, NaN or infinity; labels and counts that do not belong together or to `array`.

    Notes
    -----
    The members are added in float64, in ascending token order, starting from the first; the sum is divided by the
    count and rounded once to float32. The order is part of the contract: float64 addition is not associative. A
    token alone in its cluster is left as it is, bit for bit.

    One centroid per cluster: arXiv:2506.11418v1. That it is the plain mean of the original tokens, for
    keys and for values: our choice; the paper's text was not available to us. Costs `tokens * dim` additions. What
    attention loses by it: theory/merging, M3 to M5. Source: docs/papers.md, Chelsea: centroid.

    Examples
    --------
    Tokens 0 and 2 share entry 0:

    >>> clustering = Clustering(labels=np.array([0, 1, 0]), counts=np.array([2, 1]))
    >>> merge(np.array([[1.0], [5.0], [2.0]], dtype=np.float32), clustering)
    array([[1.5],
           [5. ]], dtype=float32)
    """
    check_array("array", array)
    labels, counts = clustering.labels, clustering.counts
    check_clustering(array, labels, counts)
    sums = np.full((*counts.shape, array.shape[-1]), -0.0)  # -0.0, not 0.0: only -0.0 + x is x for every x
    for problem in np.ndindex(*labels.shape[:-1]):
        for token, label in enumerate(labels[problem]):
            sums[problem][label] += array[problem][token].astype(np.float64)
    return (sums / counts[..., None]).astype(np.float32)  # (..., entries, dim)
