"""The online cache: tokens arrive, grow old, and are clustered chunk by chunk."""

import numpy as np
from jaxtyping import Float, Float64, Int32

from .arguments import check_append, check_integer, check_keep_ratio, entries_of_chunk
from .clustered_attention import clustered_attention
from .distinctive_matching import distinctive_matching
from .merging import merge
from .soft_matching import chunked_soft_matching
from .span_merging import check_budget, merge_entries, smallest_pair

__all__ = ["ClusteredCache"]


class ClusteredCache:
    """A key-value cache whose old tokens are centroids.

    The stored entries are, in this order: the first `n_sink` tokens (sinks), the centroids of the clustered
    chunks (body), and the last tokens (recent). Sinks and recent tokens are exact.

    Parameters
    ----------
    keep_ratio : entries kept / tokens, for the body, in (0, 1]. 1 keeps everything.
    chunk_size : tokens that are clustered together, at least 1.
    n_sink : first tokens that are never clustered, at least 0.
    n_recent : last tokens that are always exact, at least 0. Tokens leave in whole chunks, so the recent tokens
        number `n_recent <= recent < n_recent + chunk_size` as soon as that many have been seen.
    budget : the most entries that are stored after an append, sinks and recent tokens included; None for any number.
        At least `n_sink + n_recent + chunk_size - 1 + ceil(keep_ratio * chunk_size)`.
    n_shared : None for chunked soft matching. A number for `distinctive_matching`, which see: the last of the leading
        axes must then be the KV heads of a layer. Not together with a budget.

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

    The body is a list of spans with `ceil(keep_ratio * chunk_size)` entries each, at first one for each chunk. With a
    budget, as soon as a token makes the entries too many, the two neighbouring spans with the fewest tokens together
    (of equal pairs the oldest) become one span by `merge_entries`, until the entries are within the budget. That is
    decided by numbers of tokens alone, after every single token, so the cache still does not depend on how they
    arrived. With keep_ratio 1 nothing is merged while `n_seen <= budget`.

    Online clustering in chunks: arXiv:2506.11418v1. Sinks, recent window, chunk positions and the moment of
    clustering: our choice; the paper's text was not available to us. The budget: our choice, from no paper.

    Examples
    --------
    Twelve tokens: one sink, two chunks of four of which each becomes two entries, three recent tokens.

    >>> cache = ClusteredCache(keep_ratio=0.5, chunk_size=4, n_sink=1, n_recent=2)
    >>> tokens = np.random.default_rng(0).standard_normal((12, 2)).astype(np.float32)
    >>> _ = cache.append(tokens, tokens)
    >>> cache.n_seen, cache.n_stored, cache.counts
    (12, 8, array([1, 2, 2, 2, 2, 1, 1, 1], dtype=int32))

    One more token would be one too many for a budget of 8: the two spans become one.

    >>> cache = ClusteredCache(keep_ratio=0.5, chunk_size=4, n_sink=1, n_recent=2, budget=8)
    >>> for some in (tokens, tokens[:1]):
    ...     _ = cache.append(some, some)
    >>> cache.n_seen, cache.n_stored, cache.counts
    (13, 7, array([1, 2, 6, 1, 1, 1, 1], dtype=int32))
    """

    def __init__(
        self,
        *,
        keep_ratio: float,
        chunk_size: int = 64,
        n_sink: int = 4,
        n_recent: int = 64,
        budget: int | None = None,
        n_shared: int | None = None,
    ) -> None:
        check_keep_ratio(keep_ratio)
        check_integer("chunk_size", chunk_size, least=1)
        check_integer("n_sink", n_sink, least=0)
        check_integer("n_recent", n_recent, least=0)
        self._n_span = entries_of_chunk(keep_ratio, chunk_size)  # entries of a span
        if budget is not None:
            check_budget(budget, n_sink=n_sink, n_recent=n_recent, chunk_size=chunk_size, entries=self._n_span)
        if n_shared is not None:
            check_integer("n_shared", n_shared, least=1)
            if budget is not None:
                raise ValueError(f"n_shared must be None with a budget, which merges all tokens, got {n_shared}")
        self.keep_ratio, self.chunk_size, self.budget = keep_ratio, chunk_size, budget
        self.n_shared = n_shared
        self.n_sink, self.n_recent = n_sink, n_recent
        self.keys: Float[np.ndarray, "*lead entries dim"] | None = None
        self.values: Float[np.ndarray, "*lead entries dim_value"] | None = None
        self.counts: Int32[np.ndarray, "*lead entries"] | None = None
        self.n_seen = 0
        self.n_clustered = 0
        self._n_body = 0  # entries of the body
        self._spans: list[int] = []  # chunks of each span

    @property
    def n_stored(self) -> int:
        return 0 if self.keys is None else self.keys.shape[-2]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in (self.keys, self.values, self.counts) if array is not None)

    def append(
        self, keys: Float[np.ndarray, "*lead tokens dim"], values: Float[np.ndarray, "*lead tokens dim_value"]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Take the next tokens, then cluster every whole chunk that has left the recent window and keep the budget.

        Parameters
        ----------
        keys, values : (..., tokens, dim) and (..., tokens, dim_value), any number of tokens; leading axes, dims and
            dtype as in the first append.

        Returns
        -------
        keys, values, counts : the entries just before this clustering, the new tokens last. A model lets the new
            tokens attend to these, so a prompt given at once is attended to exactly. To be read only: they may be
            the cache's own arrays.

        Raises
        ------
        ValueError : wrong dtype or shape, NaN or infinity. The cache is then as it was.
        """
        check_append(keys, values, (self.keys, self.values))
        if self.keys is None:
            self.keys, self.values = keys[..., :0, :], values[..., :0, :]
            self.counts = np.empty((*keys.shape[:-2], 0), dtype=np.int32)
        seen = self._with(keys, values)
        n_tokens = keys.shape[-2]
        at_once = max(1, n_tokens) if self.budget is None else 1  # a budget is kept after every single token
        for first in range(0, n_tokens, at_once):
            tokens = slice(first, first + at_once)
            self.keys, self.values, self.counts = self._with(keys[..., tokens, :], values[..., tokens, :])
            self.n_seen += at_once
            self._cluster_what_left_the_window()
            self._merge_what_exceeds_the_budget()
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
        if self.n_shared is None:
            clustering = chunked_soft_matching(keys, keep_ratio=self.keep_ratio, chunk_size=self.chunk_size)
        else:
            clustering = distinctive_matching(
                keys, values, keep_ratio=self.keep_ratio, chunk_size=self.chunk_size, n_shared=self.n_shared
            )
        self._replace(start, stop, merge(keys, clustering), merge(values, clustering), clustering.counts)
        self.n_clustered += leaving
        self._n_body += clustering.counts.shape[-1]
        self._spans += [1] * (leaving // self.chunk_size)

    def _merge_what_exceeds_the_budget(self) -> None:
        while self.budget is not None and self.n_stored > self.budget:
            older = smallest_pair(self._spans)
            start = self.n_sink + older * self._n_span
            stop = start + 2 * self._n_span
            entries = self.keys[..., start:stop, :], self.values[..., start:stop, :], self.counts[..., start:stop]
            self._replace(start, stop, *merge_entries(*entries))
            self._n_body -= self._n_span
            self._spans[older : older + 2] = [self._spans[older] + self._spans[older + 1]]

    def _with(self, keys: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What is stored, followed by these tokens."""
        counts = np.ones(keys.shape[:-1], dtype=np.int32)
        return (
            np.concatenate([self.keys, keys], axis=-2),  # (..., entries, dim)
            np.concatenate([self.values, values], axis=-2),
            np.concatenate([self.counts, counts], axis=-1),
        )

    def _replace(self, start: int, stop: int, keys: np.ndarray, values: np.ndarray, counts: np.ndarray) -> None:
        """Put entries in the place of those from `start` to `stop`, rounded to the cache's dtypes."""
        for name, new, axis in (("keys", keys, -2), ("values", values, -2), ("counts", counts, -1)):
            before, _, after = np.split(getattr(self, name), (start, stop), axis=axis)
            setattr(self, name, np.concatenate([before, new.astype(before.dtype), after], axis=axis))
