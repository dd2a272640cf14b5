"""The bounded cache: a clustered cache that never stores more entries than a budget."""

import numpy as np

from .arguments import check_append, check_budget
from .cache import ClusteredCache
from .chunks import entries_of_chunk
from .span_merging import merge_entries, smallest_pair
from .whole_changes import whole_or_not

__all__ = ["BoundedCache"]


class BoundedCache(ClusteredCache):
    """A `ClusteredCache` by soft matching that keeps a budget: its body becomes coarser, most where it is oldest.

    Parameters
    ----------
    budget : the most entries that are stored after an append, sinks and recent tokens included. At least
        `n_sink + n_recent + chunk_size - 1 + ceil(keep_ratio * chunk_size)`.
    keep_ratio, chunk_size, n_sink, n_recent : as in `ClusteredCache`.

    Notes
    -----
    The body is a list of spans with `ceil(keep_ratio * chunk_size)` entries each, at first one for each chunk. As soon
    as a token brings the entries above the budget, the two neighbouring spans with the fewest tokens together (of equal
    pairs the oldest) become one span by `merge_entries`, until the budget is kept again. This is decided by numbers of
    tokens alone, after every single token, so this cache does not depend on how they arrived either. With keep_ratio
    1 nothing is merged while `n_seen <= budget`.

    All of it is our choice (docs/papers.md, Ours: a budget of entries); default sizes are those of `ClusteredCache`.

    Examples
    --------
    Thirteen tokens: one sink, two chunks of four, each of which becomes two entries, four recent tokens. These are
    nine entries, one too many for a budget of 8: the two spans become one.

    >>> cache = BoundedCache(budget=8, keep_ratio=0.5, chunk_size=4, n_sink=1, n_recent=2)
    >>> tokens = np.random.default_rng(0).standard_normal((12, 2)).astype(np.float32)
    >>> for new in (tokens, tokens[:1]):
    ...     _ = cache.append(new, new)
    >>> cache.n_seen, cache.n_stored, cache.counts
    (13, 7, array([1, 2, 6, 1, 1, 1, 1], dtype=int32))
    """

    def __init__(
        self, *, budget: int, keep_ratio: float, chunk_size: int = 256, n_sink: int = 16, n_recent: int = 64
    ) -> None:
        super().__init__(keep_ratio=keep_ratio, chunk_size=chunk_size, n_sink=n_sink, n_recent=n_recent)
        self._n_span = entries_of_chunk(self.keep_ratio, self.chunk_size)  # entries of a span
        sizes = {"n_sink": self.n_sink, "n_recent": self.n_recent, "chunk_size": self.chunk_size}
        self.budget = check_budget(budget, **sizes, entries=self._n_span)
        self._spans: list[int] = []  # chunks of each span

    @whole_or_not
    def append(
        self, keys: np.ndarray, values: np.ndarray, queries: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """As `ClusteredCache.append`, but the budget is kept after every single token; `queries` must be None.

        What is returned holds all the new tokens, even beyond the budget.
        """
        check_append(keys, values, (self.keys, self.values))
        super().append(keys[..., :0, :], values[..., :0, :], queries)  # a first append sets shapes and dtypes
        seen = self._with(keys, values)
        for token in range(keys.shape[-2]):
            super().append(keys[..., token : token + 1, :], values[..., token : token + 1, :])
        return seen

    def _cluster_what_is_due(self) -> None:
        before = self.n_clustered
        super()._cluster_what_is_due()
        self._spans = self._spans + [1] * ((self.n_clustered - before) // self.chunk_size)
        while self.n_stored > self.budget:
            self._merge_smallest_pair()

    def _merge_smallest_pair(self) -> None:
        older = smallest_pair(self._spans)
        start = self.n_sink + older * self._n_span
        stop = start + 2 * self._n_span
        entries = self.keys[..., start:stop, :], self.values[..., start:stop, :], self.counts[..., start:stop]
        self._replace(start, stop, *merge_entries(*entries))
        self._n_body -= self._n_span
        joined = sum(self._spans[older : older + 2])
        self._spans = [*self._spans[:older], joined, *self._spans[older + 2 :]]
