"""The cache of the paper, as far as it is known: a budget, kept by pooled matching, and heads that stay whole.

Chelsea (arXiv:2506.11418v1), later CentroidKV. As a digest of v1 by a third party has it, unverified: the budget is
`ratio * (n + G)` for a prompt of n tokens and at most G new ones; the cache is compressed to it when it exceeds it by
g, by pooled matching in chunks of 256; 16 sinks and the 64 last tokens stay exact; about 4 % of the heads keep every
token. docs/papers.md has every point that is known, and where our code does it.
"""

import math
from collections.abc import Sequence

from .arguments import check_integer, check_keep_ratio
from .entry_cache import EntryCache
from .pooled_matching import compress_entries

__all__ = ["ChelseaCache"]


class ChelseaCache(EntryCache):
    """A key-value cache that is compressed to a budget whenever it has outgrown it.

    The stored entries are, in this order: the first `n_sink` tokens (sinks), what the tokens between have become
    (body), and the last `n_recent` tokens or more (recent). Sinks and recent tokens are exact.

    Parameters
    ----------
    ratio : entries / tokens of prompt and generation, in (0, 1].
    max_new_tokens : the most tokens that are generated after the prompt (G), at least 0.
    n_prompt : tokens of the prompt (n). None: those of the first append that has any, a prompt given at once.
    interval : how many entries above the budget are let grow (g), at least 0; so decoding compresses about once in so
        many tokens.
    whole_heads : KV heads that keep every token, as in `EntryCache`. They are not part of the budget.
    chunk_size : entries that are matched together, at least 2.
    n_sink : first tokens that are never clustered, at least 0.
    n_recent : last tokens that are exact after a compression, at least 0.

    Attributes
    ----------
    budget : entries of a head after a compression, sinks and recent tokens included. None before the first token:
        `ceil(ratio * (n_prompt + max_new_tokens))`, but at least `n_sink + n_recent + 1`. The others are those of
        `EntryCache`.

    Notes
    -----
    A compression takes place at the end of an append after which more than `budget + interval` entries are stored. All
    between sinks and recent tokens, centroids with their counts and new tokens alike, is compressed together. So this
    cache depends on how the tokens arrive: what comes in one append is clustered together. That is the opposite of
    `ClusteredCache`, whose bytes are the same for every split of the tokens.

    Our choices, as the paper's text was not available to us: the value of g, that sinks and recent tokens are part of
    the budget and whole heads are not, that it is rounded up and never below what must stay exact, and those of
    `pooled_matching`. Source: docs/papers.md, Chelsea: budget.

    Examples
    --------
    A prompt of twelve tokens, to be followed by at most four: half of them are eight entries. One token is a sink, two
    are recent, so nine tokens become five entries.

    >>> import numpy as np
    >>> cache = ChelseaCache(ratio=0.5, max_new_tokens=4, interval=2, chunk_size=4, n_sink=1, n_recent=2)
    >>> tokens = np.random.default_rng(0).standard_normal((16, 2)).astype(np.float32)
    >>> _ = cache.append(tokens[:12], tokens[:12])
    >>> cache.budget, cache.counts
    (8, array([1, 2, 2, 2, 2, 1, 1, 1], dtype=int32))

    Two more tokens are let grow, the third is one too many:

    >>> for token in range(12, 15):
    ...     _ = cache.append(tokens[token : token + 1], tokens[token : token + 1])
    ...     print(cache.n_stored)
    9
    10
    8
    """

    def __init__(
        self,
        *,
        ratio: float,
        max_new_tokens: int,
        n_prompt: int | None = None,
        interval: int = 64,
        whole_heads: Sequence[int] = (),
        chunk_size: int = 256,
        n_sink: int = 16,
        n_recent: int = 64,
    ) -> None:
        super().__init__(whole_heads)
        self.ratio = check_keep_ratio(ratio, name="ratio")
        self.max_new_tokens = check_integer("max_new_tokens", max_new_tokens, least=0)
        self.n_prompt = None if n_prompt is None else check_integer("n_prompt", n_prompt, least=0)
        self.interval = check_integer("interval", interval, least=0)
        self.chunk_size = check_integer("chunk_size", chunk_size, least=2)
        self.n_sink = check_integer("n_sink", n_sink, least=0)
        self.n_recent = check_integer("n_recent", n_recent, least=0)
        self.budget: int | None = None

    def _cluster_what_is_due(self) -> None:
        if self.budget is None and self.n_seen > 0:
            n_tokens = (self.n_seen if self.n_prompt is None else self.n_prompt) + self.max_new_tokens
            wanted = math.ceil(self.ratio * n_tokens)  # the product in float64, as in `entries_of_chunk`
            self.budget = max(wanted, self.n_sink + self.n_recent + 1)
        if self.budget is None or self.n_stored <= self.budget + self.interval:
            return
        # stored entries:  sinks | body | recent
        #                      start    stop
        start, stop = self.n_sink, self.n_stored - self.n_recent
        body = self.keys[..., start:stop, :], self.values[..., start:stop, :], self.counts[..., start:stop]
        target = self.budget - self.n_sink - self.n_recent
        self._replace(start, stop, *compress_entries(*body, target=target, chunk_size=self.chunk_size))
