"""The online cache: tokens arrive, grow old, and are clustered chunk by chunk."""

from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Float64, Int32

from .arguments import check_append, check_integer, check_keep_ratio, check_method
from .clustered_attention import clustered_attention
from .merging import Clustering, merge
from .soft_matching import SoftMatching

__all__ = ["ClusteredCache", "Method"]


@runtime_checkable
class Method(Protocol):
    """What decides which tokens of a chunk share an entry: `SoftMatching()`, `Distinctive()`, or another."""

    def cluster(self, keys: np.ndarray, values: np.ndarray, *, keep_ratio: float, chunk_size: int) -> Clustering: ...


class ClusteredCache:
    """A key-value cache in which centroids stand for the old tokens.

    The stored entries are, in this order: the first `n_sink` tokens (sinks), the centroids of the clustered
    chunks (body), and the last tokens (recent). Sinks and recent tokens are exact.

    Parameters
    ----------
    keep_ratio : entries kept / tokens, for the body, in (0, 1]. 1 keeps everything.
    method : what clusters a chunk; its `cluster` is called.
    chunk_size : tokens that are clustered together, at least 1.
    n_sink : first tokens that are never clustered, at least 0.
    n_recent : last tokens that are always exact, at least 0. Tokens leave in whole chunks, so the recent tokens
        number `n_recent <= recent < n_recent + chunk_size` as soon as that many have been seen.

    Attributes
    ----------
    keys, values : (..., n_stored, dim) and (..., n_stored, dim_value), in the dtype that was appended; None at first.
    counts : (..., n_stored), int32: tokens per entry; None at first.
    n_seen : tokens appended so far: the position of the next token.
    n_clustered : of these, the tokens of clustered chunks: positions `n_sink` to `n_sink + n_clustered - 1`.
    n_stored : entries held.
    nbytes : bytes of keys, values and counts.

    Notes
    -----
    Chunks lie at absolute positions (the first begins at `n_sink`) and each is clustered once, alone. So the cache
    does not depend on how the tokens arrived: one prefill, token by token or any split gives the same bytes.

    Online clustering in chunks: arXiv:2506.11418v1. Sinks, recent window, chunk positions and the moment of
    clustering: our choice; the paper's text was not available to us.

    Examples
    --------
    Twelve tokens: one sink, two chunks of four, each of which becomes two entries, three recent tokens.

    >>> cache = ClusteredCache(keep_ratio=0.5, chunk_size=4, n_sink=1, n_recent=2)
    >>> tokens = np.random.default_rng(0).standard_normal((12, 2)).astype(np.float32)
    >>> _ = cache.append(tokens, tokens)
    >>> cache.n_seen, cache.n_stored, cache.counts
    (12, 8, array([1, 2, 2, 2, 2, 1, 1, 1], dtype=int32))
    """

    def __init__(
        self,
        *,
        keep_ratio: float,
        method: Method = SoftMatching(),
        chunk_size: int = 64,
        n_sink: int = 4,
        n_recent: int = 64,
    ) -> None:
        check_keep_ratio(keep_ratio)
        check_method(method)
        check_integer("chunk_size", chunk_size, least=1)
        check_integer("n_sink", n_sink, least=0)
        check_integer("n_recent", n_recent, least=0)
        self.keep_ratio, self.method, self.chunk_size = keep_ratio, method, chunk_size
        self.n_sink, self.n_recent = n_sink, n_recent
        self.keys: Float[np.ndarray, "*lead entries dim"] | None = None
        self.values: Float[np.ndarray, "*lead entries dim_value"] | None = None
        self.counts: Int32[np.ndarray, "*lead entries"] | None = None
        self.n_seen = 0
        self.n_clustered = 0
        self._n_body = 0  # entries of the body

    @property
    def n_stored(self) -> int:
        return 0 if self.keys is None else self.keys.shape[-2]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in (self.keys, self.values, self.counts) if array is not None)

    def append(
        self, keys: Float[np.ndarray, "*lead tokens dim"], values: Float[np.ndarray, "*lead tokens dim_value"]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Take the next tokens, then cluster every whole chunk that has left the recent window.

        Parameters
        ----------
        keys, values : (..., tokens, dim) and (..., tokens, dim_value), any number of tokens; leading axes, dims and
            dtype as in the first append.

        Returns
        -------
        keys, values, counts : the entries just before this clustering, the new tokens last. A model lets the new
            tokens attend to these, so a prompt given at once is attended to exactly. Do not write to them: they may
            be the cache's own arrays.

        Raises
        ------
        ValueError : wrong dtype or shape, NaN or infinity. The cache is then as it was.
        """
        check_append(keys, values, (self.keys, self.values))
        if self.keys is None:
            self.keys, self.values = keys[..., :0, :], values[..., :0, :]
            self.counts = np.empty((*keys.shape[:-2], 0), dtype=np.int32)
        seen = self._with(keys, values)
        self.keys, self.values, self.counts = seen
        self.n_seen += keys.shape[-2]
        self._cluster_what_left_the_window()
        return seen

    def attend(
        self, query: Float[np.ndarray, "*lead queries dim"], *, scale: float | None = None
    ) -> Float64[np.ndarray, "*lead queries dim_value"]:
        """Clustered attention of `query` (..., queries, dim) to all stored entries.

        Raises
        ------
        ValueError : nothing appended yet; else as `clustered_attention`.
        """
        if self.keys is None:
            raise ValueError("attend needs at least one appended token, got an empty cache")
        return clustered_attention(query, self.keys, self.values, self.counts, scale=scale)

    def _cluster_what_left_the_window(self) -> None:
        recent = max(0, self.n_seen - self.n_sink - self.n_clustered)
        leaving = max(0, recent - self.n_recent) // self.chunk_size * self.chunk_size
        if leaving == 0:
            return
        # stored entries:  sinks | body | leaving | recent
        #                              start     stop
        start = self.n_sink + self._n_body
        stop = start + leaving
        keys, values = self.keys[..., start:stop, :], self.values[..., start:stop, :]
        clustering = self.method.cluster(keys, values, keep_ratio=self.keep_ratio, chunk_size=self.chunk_size)
        self._replace(start, stop, merge(keys, clustering), merge(values, clustering), clustering.counts)
        self.n_clustered += leaving
        self._n_body += clustering.counts.shape[-1]

    def _with(self, keys: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What is stored, followed by these tokens."""
        counts = np.ones(keys.shape[:-1], dtype=np.int32)
        return (
            np.concatenate([self.keys, keys], axis=-2),  # (..., entries, dim)
            np.concatenate([self.values, values], axis=-2),
            np.concatenate([self.counts, counts], axis=-1),
        )

    def _replace(self, start: int, stop: int, keys: np.ndarray, values: np.ndarray, counts: np.ndarray) -> None:
        """Put these entries, rounded to the cache's dtypes, in the place of those from `start` to `stop`."""
        for name, new, axis in (("keys", keys, -2), ("values", values, -2), ("counts", counts, -1)):
            before, _, after = np.split(getattr(self, name), (start, stop), axis=axis)
            setattr(self, name, np.concatenate([before, new.astype(before.dtype), after], axis=axis))
