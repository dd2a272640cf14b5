"""Canonical similarity: how alike two keys are, bit for bit the same on every machine.

Whether two tokens share a cluster is decided by comparing similarities, and a difference in the last
bit can reverse a decision. So the similarity is made only from operations that IEEE 754 rounds
correctly everywhere (`+`, `*`, `/` in float64), in an order that is written down here.
"""

import numpy as np
from jaxtyping import Float, Float64

from .arguments import check_pair

__all__ = ["halving_sum", "similarity"]


def similarity(
    a: Float[np.ndarray, "*lead m dim"], b: Float[np.ndarray, "*lead n dim"]
) -> Float64[np.ndarray, "*lead m n"]:
    """Signed squared cosine of every row of `a` with every row of `b`.

    Parameters
    ----------
    a : (..., m, dim), float16, bfloat16 or float32.
    b : (..., n, dim), same leading axes and dim.

    Returns
    -------
    (..., m, n), float64, between -1 and 1 up to rounding: `dot * |dot| / (|a|^2 * |b|^2)`; 0 where a row is zero.

    Raises
    ------
    ValueError : wrong dtype, NaN or infinity, shapes that do not fit.

    Notes
    -----
    Orders pairs as the cosine does, `cos * |cos|` being increasing in `cos`, and needs no square root
    (library square roots were seen to differ in the last bit). The product of two float32 numbers is
    exact in float64, so fused multiply-add cannot change it either (theory/exactness, E1 to E3).

    Cosine: our choice, as in ToMe (arXiv:2210.09461); the text of arXiv:2506.11418 was not available
    to us. Costs about `2 * m * n * dim` operations in float64. Source: docs/papers.md, Chelsea: similarity.

    Examples
    --------
    The same direction, an orthogonal one, the opposite one, and a zero key:

    >>> a = np.array([[3, 4]], dtype=np.float32)
    >>> b = np.array([[6, 8], [-4, 3], [-3, -4], [0, 0]], dtype=np.float32)
    >>> similarity(a, b)
    array([[ 1.,  0., -1.,  0.]])
    """
    check_pair(a, b)
    a, b = a.astype(np.float64), b.astype(np.float64)
    dot = halving_sum(a[..., :, None, :] * b[..., None, :, :])  # (..., m, n)
    norms = halving_sum(a * a)[..., :, None] * halving_sum(b * b)[..., None, :]  # (..., m, n), both squared
    is_zero = norms == 0
    return np.where(is_zero, 0.0, dot * np.abs(dot) / np.where(is_zero, 1.0, norms))


def halving_sum(terms: Float64[np.ndarray, "*lead dim"]) -> Float64[np.ndarray, "*lead"]:
    """Sum over the last axis in one fixed order: pad with zeros to a power of two, add halves until one is left.

    >>> halving_sum(np.array([[1.0, 2.0, 3.0]]))  # (1 + 3) + (2 + 0)
    array([6.])
    """
    dim = terms.shape[-1]
    half = 1
    while half < dim:
        half *= 2
    padded = np.zeros((*terms.shape[:-1], half))
    padded[..., :dim] = terms
    while half > 1:
        half //= 2
        padded = padded[..., :half] + padded[..., half:]  # (..., half)
    return padded[..., 0]
