"""Attended matching: exact stay the tokens that the next ones look at, and the distinctive ones; others share entries.

All of it is our choice; no paper defines it. Distinctive matching keeps what a later question may ask for. The text
that goes on needs other tokens: those that are looked at again and again. Which these are is seen while a chunk is
still recent, by the queries of the tokens behind it: an observation window, as in SnapKV (arXiv:2404.14469), but one
for every chunk. A query attends more to a token than to another if its dot product with that key is larger. So a
token's score is the most by which it surpasses the best of the others, over all queries: differences that softmax
weights depend on, without an exponential, whose last bits differ from machine to machine.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Float, Float64, Int64

from .arguments import check_append, check_integer, check_keep_ratio, check_share
from .chunks import cluster_chunks, entries_of_chunk
from .distinctive_matching import distinctiveness, match_ordinary, numbers_of_entries
from .merging import Clustering
from .recent_queries import check_chunk_queries
from .similarity import halving_sum

__all__ = ["Attended", "attended_matching", "attention_margins"]


@dataclass(frozen=True)
class Attended:
    """`attended_matching` as a value, for a cache that is given queries too (docs/papers.md, Ours: attended matching).

    >>> Attended()
    Attended(share=0.5, n_shared=4)
    """

    share: float = 0.5
    n_shared: int = 4
    needs_queries: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "share", check_share("share", self.share))
        object.__setattr__(self, "n_shared", check_integer("n_shared", self.n_shared, least=1))

    def cluster(
        self,
        keys: Float[np.ndarray, "*lead tokens dim"],
        values: Float[np.ndarray, "*lead tokens dim_value"],
        *,
        queries: Float[np.ndarray, "*lead chunks queries dim"],
        keep_ratio: float,
        chunk_size: int,
    ) -> Clustering:
        """`attended_matching` with this `share` and `n_shared`."""
        sizes = {"chunk_size": chunk_size, "n_shared": self.n_shared}
        return attended_matching(keys, values, queries, keep_ratio=keep_ratio, share=self.share, **sizes)


def attended_matching(
    keys: Float[np.ndarray, "*lead tokens dim"],
    values: Float[np.ndarray, "*lead tokens dim_value"],
    queries: Float[np.ndarray, "*lead chunks queries dim"],
    *,
    keep_ratio: float,
    chunk_size: int = 256,
    share: float = 0.5,
    n_shared: int = 4,
) -> Clustering:
    """Each chunk of `chunk_size` tokens in `ceil(keep_ratio * chunk_size)` clusters, most of them single tokens.

    Parameters
    ----------
    keys, values : as in `distinctive_matching`.
    queries : for each whole chunk, and each KV head, those that look at it, at least one: of all query heads of the
        group, of tokens behind the chunk. In the dtypes of keys; their order does not matter.
    keep_ratio, chunk_size, n_shared : as in `distinctive_matching`.
    share : of the exact tokens of a chunk, the part that is chosen by `attention_margins`, for each head alone; the
        number is rounded down. The others are the most distinctive of those that are left, as in
        `distinctive_matching`, which this is with 0.

    Returns
    -------
    Clustering : in each chunk first the exact tokens in their order, then the shared entries.

    Raises
    ------
    ValueError : a number out of range; keys, values or queries of a wrong dtype or shape, NaN or infinite.

    Notes
    -----
    Costs `queries * dim` multiply-adds a token beside those of `Distinctive` (docs/papers.md, Ours: attended matching).

    Examples
    --------
    One query looks for the second of eight tokens, which are all alike but for their length. Of two exact tokens one is
    chosen by it; the other is the first of equally distinctive ones.

    >>> keys = np.float32([[2, 0], [3, 0], [2, 0], [2, 0], [2, 0], [2, 0], [2, 0], [2, 0]])
    >>> queries = np.float32([[[1, 0]]])
    >>> attended_matching(keys, keys, queries, keep_ratio=0.375, chunk_size=8, n_shared=1).labels
    array([0, 1, 2, 2, 2, 2, 2, 2])
    """
    check_append(keys, values, (None, None))
    keep_ratio = check_keep_ratio(keep_ratio)
    chunk_size = check_integer("chunk_size", chunk_size, least=1)
    share = check_share("share", share)
    n_shared = check_integer("n_shared", n_shared, least=1)
    check_chunk_queries(queries, keys, chunk_size)
    margins = np.zeros((*keys.shape[:-1], 1))
    if entries_of_chunk(keep_ratio, chunk_size) < chunk_size:
        for chunk in range(keys.shape[-2] // chunk_size):
            span = slice(chunk * chunk_size, (chunk + 1) * chunk_size)
            margins[..., span, 0] = attention_margins(keys[..., span, :], queries[..., chunk, :, :])

    def match(keys: np.ndarray, values: np.ndarray, margins: np.ndarray, target: int) -> np.ndarray:
        return match_attended(keys, values, margins[..., 0], target, share, n_shared)

    layers = keys.shape[:-3]
    return cluster_chunks(match, keys, values, margins, alone=layers, keep_ratio=keep_ratio, chunk_size=chunk_size)


def match_attended(
    keys: np.ndarray, values: np.ndarray, margins: np.ndarray, target: int, share: float, n_shared: int
) -> Int64[np.ndarray, "..."]:
    """Labels (kv_heads, chunk) of one chunk (kv_heads, chunk, dim); there may be no axis of heads."""
    *heads, size, _ = keys.shape
    if target == size:
        return np.broadcast_to(np.arange(size), (*heads, size))
    n_exact, n_shared = numbers_of_entries(target, n_shared)
    n_attended = math.floor(share * n_exact)
    distinctive_first = np.argsort(-distinctiveness(keys, values), kind="stable")  # stable: of ties, the first
    labels = np.empty((*heads, size), dtype=np.int64)
    for head in np.ndindex(*heads):
        attended = np.argsort(-margins[head], kind="stable")[:n_attended]
        others = distinctive_first[~np.isin(distinctive_first, attended)]
        exact = np.concatenate([attended, others[: n_exact - n_attended]])
        labels[head] = match_ordinary(keys[head], exact, n_shared)
    return labels


def attention_margins(
    keys: Float[np.ndarray, "*lead chunk dim"], queries: Float[np.ndarray, "*lead queries dim"]
) -> Float64[np.ndarray, "*lead chunk"]:
    """The most by which each token's dot product with a query surpasses the largest of all other tokens'.

    Of a chunk of at least two tokens. The token that a query likes best has a margin that is not negative.

    >>> keys = np.float32([[1, 0], [0, 1], [0, 3]])
    >>> attention_margins(keys, np.float32([[2, 0], [0, 1]]))
    array([ 2., -2.,  2.])
    """
    dots = halving_sum(queries.astype(np.float64)[..., :, None, :] * keys.astype(np.float64)[..., None, :, :])
    second, best = np.moveaxis(np.sort(dots, axis=-1)[..., -2:], -1, 0)  # (..., queries)
    is_best = np.arange(dots.shape[-1]) == dots.argmax(axis=-1)[..., None]
    margins: np.ndarray = (dots - np.where(is_best, second[..., None], best[..., None])).max(axis=-2)
    return margins
