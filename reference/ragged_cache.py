"""A layer whose KV heads keep shares of their own: few heads look far back, and these are worth most entries."""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Float64

from .arguments import check_array, check_keep_ratios, check_n_heads
from .cache import ClusteredCache, Method
from .clustered_attention import clustered_attention
from .soft_matching import SoftMatching

__all__ = ["RaggedCache"]

Entries = tuple[np.ndarray, np.ndarray, np.ndarray]  # keys, values, counts


class RaggedCache:
    """A key-value cache whose head h is head h of a `ClusteredCache` with `keep_ratios[h]`.

    So every chunk gives a head its own number of entries, the same in each chunk and batch row. The lengths of heads
    differ ("ragged"); none has to be padded to the length of another.

    Parameters
    ----------
    keep_ratios : entries kept / tokens, one for each KV head, the last of the leading axes; 1 for a whole head.
    method, chunk_size, n_sink, n_recent, recent_share, bits, n_exact : as in `ClusteredCache`, for all heads.

    Attributes
    ----------
    n_seen : tokens appended so far.
    lengths : entries held of each head.
    nbytes : bytes of keys, values and counts of these entries.

    Notes
    -----
    Held are whole caches, one for each ratio that occurs, of which only the heads with that ratio are read: that is the
    definition, no way to save memory. Where heads decide together, as in `Distinctive`, each head is clustered as if
    all had its ratio. That heads should have different shares is known (AdaKV, arXiv:2407.11550); that the shares are
    numbers found once for a model is our choice, see `kvcluster tune`. Source: docs/papers.md, Ours: shares of heads.

    Examples
    --------
    Ten tokens: one sink, two chunks of four, one recent token. The first head keeps every token.

    >>> cache = RaggedCache(keep_ratios=(1.0, 0.5), chunk_size=4, n_sink=1, n_recent=1)
    >>> tokens = np.random.default_rng(0).standard_normal((2, 10, 2)).astype(np.float32)
    >>> _ = cache.append(tokens, tokens)
    >>> cache.lengths
    (10, 6)
    >>> cache.entries()[2]
    array([[1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
           [0, 0, 0, 0, 1, 1, 3, 2, 2, 1]], dtype=int32)
    """

    def __init__(
        self,
        *,
        keep_ratios: Sequence[float],
        method: Method = SoftMatching(),
        chunk_size: int = 256,
        n_sink: int = 16,
        n_recent: int = 64,
        recent_share: float = 0.0,
        bits: int | tuple[int, int] = 16,
        n_exact: int | None = None,
    ) -> None:
        self.keep_ratios = check_keep_ratios(keep_ratios)
        rules: dict[str, Any] = {"method": method, "chunk_size": chunk_size, "n_sink": n_sink, "n_recent": n_recent}
        rules |= {"recent_share": recent_share, "bits": bits, "n_exact": n_exact}
        self.caches = {ratio: ClusteredCache(keep_ratio=ratio, **rules) for ratio in self.keep_ratios}

    @property
    def n_seen(self) -> int:
        return self.caches[self.keep_ratios[0]].n_seen

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(self.caches[ratio].n_stored for ratio in self.keep_ratios)

    @property
    def nbytes(self) -> int:
        return sum(self.caches[ratio].nbytes for ratio in self.keep_ratios) // len(self.keep_ratios)

    def append(
        self,
        keys: Float[np.ndarray, "*lead tokens dim"],
        values: Float[np.ndarray, "*lead tokens dim_value"],
        queries: Float[np.ndarray, "*lead group tokens dim"] | None = None,
    ) -> Entries:
        """As `ClusteredCache.append`. Returns `entries` just before the clustering, the new tokens last.

        Raises
        ------
        ValueError : another number of heads than `keep_ratios`; else as in `ClusteredCache`. It is then as it was.
        """
        check_array("keys", keys)
        check_n_heads(self.keep_ratios, keys.shape)
        caches = {ratio: copy.copy(cache) for ratio, cache in self.caches.items()}
        seen = {ratio: cache.append(keys, values, queries) for ratio, cache in caches.items()}
        before = rectangle(self._heads_of(seen))
        self.caches = caches  # all at once
        return before

    def attend(
        self, query: Float[np.ndarray, "*lead queries dim"], *, scale: float | None = None
    ) -> Float64[np.ndarray, "*lead queries dim_value"]:
        """Clustered attention of `query` (..., heads, queries, dim), each head to its own entries; errors as there."""
        entries = self.entries()
        if entries is None:
            raise ValueError("attend needs at least one appended token, got an empty cache")
        return clustered_attention(query, *entries, scale=scale)

    def entries(self) -> Entries | None:
        """Keys, values and counts of all heads, (..., heads, entries, .), as many as the longest has; None at first.

        The entries of other heads come last, after zeros of count 0, which take no part in attention.
        """
        heads = self._heads()
        return None if heads is None else rectangle(heads)

    def _heads(self) -> list[Entries] | None:
        """Keys (..., entries, dim), values and counts (..., entries) of each head; None before the first append."""
        stored: dict[float, Any] = {ratio: cache.entries() for ratio, cache in self.caches.items()}
        return None if stored[self.keep_ratios[0]][0] is None else self._heads_of(stored)

    def _heads_of(self, entries: dict[float, Entries]) -> list[Entries]:
        """Each head of those that were clustered by its ratio."""
        of_heads = enumerate(entries[ratio] for ratio in self.keep_ratios)
        return [(keys[..., h, :, :], values[..., h, :, :], counts[..., h, :]) for h, (keys, values, counts) in of_heads]


def rectangle(heads: list[Entries]) -> Entries:
    """All heads in one rectangle, the entries of shorter ones last."""
    longest = max(counts.shape[-1] for _, _, counts in heads)

    def stacked(arrays: Sequence[np.ndarray]) -> np.ndarray:
        front = [(0, 0)] * (arrays[0].ndim - 2)
        return np.stack([np.pad(x, [*front, (longest - x.shape[-2], 0), (0, 0)]) for x in arrays], axis=-3)

    keys, values, counts = zip(*heads, strict=True)
    return stacked(keys), stacked(values), stacked([x[..., None] for x in counts])[..., 0]
