"""Which tokens of a request are clustered, and which of its pages hold what: all that scheduler and worker agree on.

A function of two numbers that both sides know, the tokens processed and the length of the prompt, so nothing is ever
said between them. Our choice; no paper describes it.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

from ..methods import Method
from ..scalars import check_integer, check_keep_ratio, entries_of_chunk
from ..soft_matching import SoftMatching

__all__ = ["PageRule"]


@dataclass(frozen=True)
class PageRule:
    """Chunks of whole pages, each clustered into its own first pages.

    Parameters
    ----------
    page : tokens of a page, what vLLM calls the block size.
    keep_ratio, method, chunk_size, n_sink, n_recent : as in `kvcluster.fast.ClusteredCache`, which holds the same
        entries after the same tokens.

    Raises
    ------
    ValueError : a number out of range; a chunk, its entries or the sinks are not whole pages.

    Notes
    -----
    Sinks | chunks, one after the other | the rest, exact. A clustered chunk fills `keep_ratio` of its pages and the
    others, its hole, are free for other requests. Pages stay where they are in the request's list, so positions and
    the places of new tokens are vLLM's own.

    >>> rule = PageRule(page=32, keep_ratio=0.25, chunk_size=128, n_sink=32, n_recent=40)
    >>> rule.n_chunks(n_tokens=330, n_prompt=330)  # 32 sinks, 2 chunks, 42 exact tokens
    2
    >>> rule.kept_pages(n_tokens=330, n_chunks=2)
    array([ 0,  1,  5,  9, 10])
    >>> rule.hole(1)  # of the second chunk, pages 5 to 8: its entries are in page 5
    range(6, 9)
    """

    page: int
    keep_ratio: float
    chunk_size: int
    n_sink: int
    n_recent: int
    method: Method = SoftMatching()

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep_ratio", check_keep_ratio(self.keep_ratio))
        for name, least in (("page", 1), ("chunk_size", 1), ("n_sink", 0), ("n_recent", 0)):
            object.__setattr__(self, name, check_integer(name, getattr(self, name), least=least))
        for name, number in (
            ("chunk_size", self.chunk_size),
            ("n_sink", self.n_sink),
            ("keep_ratio * chunk_size", self.entries),
        ):
            if number % self.page:
                raise ValueError(f"{name} must be a multiple of the block size {self.page}, got {number}")

    @property
    def entries(self) -> int:
        """Entries of a clustered chunk."""
        return entries_of_chunk(self.keep_ratio, self.chunk_size)

    @property
    def is_exact(self) -> bool:
        """Whether nothing is ever clustered."""
        return self.entries == self.chunk_size

    def n_chunks(self, n_tokens: int, n_prompt: int) -> int:
        """Chunks that are clustered once `n_tokens` are processed: none before the whole prompt is."""
        if n_tokens < n_prompt or self.is_exact:
            return 0
        return max(0, n_tokens - self.n_sink - self.n_recent) // self.chunk_size

    def n_stored(self, n_tokens: int, n_chunks: int) -> int:
        """Entries held for `n_tokens` tokens."""
        return n_tokens - n_chunks * (self.chunk_size - self.entries)

    def pages_of(self, chunk: int) -> range:
        """Places of a chunk's pages in the request's list."""
        first = (self.n_sink + chunk * self.chunk_size) // self.page
        return range(first, first + self.chunk_size // self.page)

    def hole(self, chunk: int) -> range:
        """Those of them that are free once it is clustered."""
        return self.pages_of(chunk)[self.entries // self.page :]

    def most_pages(self, n_tokens: int) -> int:
        """The most pages that a request of up to `n_tokens` tokens holds at once, if its prompt never holds holes."""
        n_chunks = self.n_chunks(n_tokens, 1)
        numbers = [len(self.kept_pages(n_tokens, n_chunks))]
        if n_chunks:  # just before the last hole is free
            numbers.append(len(self.kept_pages(self.n_sink + self.n_recent + n_chunks * self.chunk_size, n_chunks - 1)))
        return max(numbers)

    def kept_pages(self, n_tokens: int, n_chunks: int) -> Int64[np.ndarray, " pages"]:
        """Places of the pages that hold entries, in order."""
        n_pages, n_sinks = -(-n_tokens // self.page), self.n_sink // self.page
        chunk_pages = (np.arange(n_chunks) * self.chunk_size // self.page)[:, None]
        chunk_pages = n_sinks + chunk_pages + np.arange(self.entries // self.page)
        exact = (self.n_sink + n_chunks * self.chunk_size) // self.page
        parts = np.arange(min(n_sinks, n_pages)), chunk_pages.flatten(), np.arange(exact, n_pages)
        return np.concatenate(parts)
