"""The online cache: tokens arrive, grow old, and are clustered chunk by chunk."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from .arguments import check_integer, check_keep_ratio, check_method, check_recent_share
from .merging import Clustering, merge
from .quantized_body import CacheWithBits
from .soft_matching import SoftMatching

__all__ = ["ClusteredCache", "Method"]


@runtime_checkable
class Method(Protocol):
    """What decides which tokens of a chunk share an entry: `SoftMatching()`, `Distinctive()`, or another."""

    def cluster(self, *arrays: Any, **rules: Any) -> Clustering: ...  # keys, values; keep_ratio and chunk_size


class ClusteredCache(CacheWithBits):
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
    recent_share : at least `floor(recent_share * n_seen)` of the last tokens are exact too, in [0, 0.5].
    whole_heads, bits, n_exact : heads that keep every token, numbers in few bits, as in `CacheWithBits`.

    Attributes
    ----------
    n_clustered : tokens of clustered chunks, from position `n_sink` on. The others are those of `CacheWithBits`.

    Notes
    -----
    Chunks lie at absolute positions (the first begins at `n_sink`) and each is clustered once, alone. So the cache
    does not depend on how the tokens arrived: one prefill, token by token or any split gives the same bytes.

    Online clustering in chunks: arXiv:2506.11418v1 (docs/papers.md, Chelsea: division); default sizes as a digest of v1
    has them, the best measured here (docs/published.md). Positions, moment of clustering, `recent_share`: our choice.

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
        chunk_size: int = 256,
        n_sink: int = 16,
        n_recent: int = 64,
        recent_share: float = 0.0,
        whole_heads: Sequence[int] = (),
        bits: int | tuple[int, int] = 16,
        n_exact: int | None = None,
    ) -> None:
        super().__init__(method, whole_heads, bits, chunk_size, n_sink, n_recent, n_exact)
        self.keep_ratio = check_keep_ratio(keep_ratio)
        check_method(method)
        self.chunk_size = check_integer("chunk_size", chunk_size, least=1)
        self.n_sink = check_integer("n_sink", n_sink, least=0)
        self.n_recent = check_integer("n_recent", n_recent, least=0)
        self.recent_share = check_recent_share(recent_share)
        self.n_clustered, self._n_body = 0, 0  # tokens; entries of the body, but for quantized ones

    def _cluster_what_is_due(self) -> None:
        n_recent = max(self.n_recent, int(self.recent_share * self.n_seen))
        leaving = max(0, self.n_seen - self.n_sink - self.n_clustered - n_recent) // self.chunk_size * self.chunk_size
        # entries that are not quantized:  sinks | body | leaving | recent
        #                                              start     stop
        start = self.n_sink + self._n_body
        self._quantize_recent(start, leaving)
        if leaving == 0:
            return
        stop = start + leaving
        keys, values = self.keys[..., start:stop, :], self.values[..., start:stop, :]
        rules = {"keep_ratio": self.keep_ratio, "chunk_size": self.chunk_size, **self._queries_of(leaving)}
        clustering = self.method.cluster(keys, values, **rules)
        self._replace(start, stop, merge(keys, clustering), merge(values, clustering), clustering.counts)
        self.n_clustered += leaving
        self._n_body = self._quantize_whole_groups(self.n_sink, self._n_body + clustering.counts.shape[-1])
