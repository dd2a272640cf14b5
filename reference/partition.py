"""The alternating partition: who may merge with whom in one round of matching."""

import numpy as np
from jaxtyping import Int64

from .arguments import check_integer

__all__ = ["alternating_partition"]


def alternating_partition(size: int) -> tuple[Int64[np.ndarray, " sources"], Int64[np.ndarray, " destinations"]]:
    """Entries 0, 2, 4, ... as sources and 1, 3, 5, ... as destinations.

    Parameters
    ----------
    size : number of entries, at least 0.

    Returns
    -------
    sources : (ceil(size / 2),), int64.
    destinations : (floor(size / 2),), int64; empty where `size` is below 2.

    Raises
    ------
    ValueError : `size` below 0.

    Notes
    -----
    Every source has a destination right beside it, which is where similar keys are expected; where similarity falls
    with distance no partition is better (theory/partition, P1 and P2).
    Alternating partition: arXiv:2506.11418v1. Even entries as sources: our choice, as in ToMe
    (arXiv:2210.09461); the paper's text was not available to us. Source: docs/papers.md, Chelsea: partition.

    Examples
    --------
    >>> alternating_partition(5)
    (array([0, 2, 4]), array([1, 3]))
    """
    size = check_integer("size", size, least=0)
    entries = np.arange(size, dtype=np.int64)
    return entries[0::2], entries[1::2]
