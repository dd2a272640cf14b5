"""Sampling: the tokens at which k-means begins, drawn at random, and the same ones on every machine."""

import numpy as np
from jaxtyping import Int64

__all__ = ["sample_tokens"]

MASK = 2**32 - 1
STEP, FACTOR = 0x9E3779B9, 0x45D9F3B  # FACTOR < 2**31, so that 32 bits times it fit into int64


def sample_tokens(n_tokens: int, n_drawn: int, *, seed: int, head: int, start: int) -> Int64[np.ndarray, " n_drawn"]:
    """Indices of `n_drawn` of `n_tokens` tokens, ascending, drawn without replacement.

    Parameters
    ----------
    seed : from 0 to 2**32 - 1.
    head, start : other ones get other tokens: number of the head, number of tokens before these.

    Notes
    -----
    Each token has a pseudorandom number, its own among all; those with the smallest are drawn. A number depends on
    seed, head, start and index, in integers only, so that heads and segments can be drawn for in any order. That the
    first centroids are a random sample is from the paper (arXiv:2412.03213), which sample is our choice.

    Examples
    --------
    >>> sample_tokens(10, 3, seed=0, head=0, start=0), sample_tokens(10, 3, seed=1, head=0, start=0)
    (array([0, 4, 5]), array([4, 5, 6]))
    """
    numbers: int | np.ndarray = 0
    for word in (int(seed), head, start, np.arange(n_tokens)):
        numbers = scramble(numbers, word)
    return np.sort(np.argsort(numbers)[:n_drawn])


def scramble(state: int | np.ndarray, word: int | np.ndarray) -> int | np.ndarray:
    """32 bits that depend on both; different ones for different words below 2**32."""
    bits = (state + word + STEP) & MASK
    for _ in range(2):
        bits = (bits ^ bits >> 16) * FACTOR & MASK
    return bits ^ bits >> 16
