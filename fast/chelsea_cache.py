"""The cache of the paper, as far as it is known, on torch tensors."""

import math
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxtyping import Int64
from torch import Tensor

from .arguments import with_four_axes
from .backends import AnyBackend, implementation
from .entry_cache import UNDO_TOKENS, EntryCache
from .memory.room import LEAST_ROOM, move_to_room
from .scalars import check_integer, check_keep_ratio

__all__ = ["ChelseaCache"]


class Before(NamedTuple):
    """What a compression replaced: memory, entries in it, and `n_seen` at the compression before that."""

    held: tuple[Tensor, ...]
    n_stored: int
    compressed_at: int


class ChelseaCache(EntryCache):
    """A key-value cache that is compressed to a budget by pooled matching whenever it has outgrown it.

    Defined, with parameters, attributes and errors, by `kvcluster.reference.ChelseaCache`: the same bytes, on the
    device of what is appended. `backend` as in `choose`, for the compression.

    Notes
    -----
    A compression moves what is left to new memory. For `crop`, what it replaced is kept until the next tokens come if
    those that caused it were at most `UNDO_TOKENS`; `nbytes_reserved` counts it.
    """

    _kept_for_good = "older tokens are compressed for good"

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
        backend: AnyBackend = "auto",
    ) -> None:
        super().__init__(whole_heads)
        self.ratio = check_keep_ratio(ratio, name="ratio")
        self.max_new_tokens = check_integer("max_new_tokens", max_new_tokens, least=0)
        self.n_prompt = None if n_prompt is None else check_integer("n_prompt", n_prompt, least=0)
        self.interval = check_integer("interval", interval, least=0)
        self.chunk_size = check_integer("chunk_size", chunk_size, least=2)
        self.n_sink = check_integer("n_sink", n_sink, least=0)
        self.n_recent = check_integer("n_recent", n_recent, least=0)
        self._least_room, self.backend = max(LEAST_ROOM, self.interval + 1), backend
        self._n_first = 0  # tokens of the first append that had any
        self._compressed_at = 0  # `n_seen` at the last compression
        self._n_last = 0  # tokens of the last append
        self._before: Before | None = None  # the last compression

    @property
    def budget(self) -> int | None:
        """Entries of a head after a compression; None before the first token."""
        if not self._n_first:
            return None
        n_tokens = (self._n_first if self.n_prompt is None else self.n_prompt) + self.max_new_tokens
        return max(math.ceil(self.ratio * n_tokens), self.n_sink + self.n_recent + 1)

    @property
    def nbytes_reserved(self) -> int:
        """Bytes of memory held, with room to grow and with what `crop` may need."""
        before = () if self._before is None else self._before.held
        return super().nbytes_reserved + sum(tensor.untyped_storage().nbytes() for tensor in before)

    @property
    def n_croppable(self) -> int:
        """The most tokens that `crop` can remove now: those since a compression that cannot be undone."""
        return self.n_seen - (self._compressed_at if self._before is None else self._before.compressed_at)

    def _extend(self, keys: Tensor, values: Tensor) -> None:
        super()._extend(keys, values)
        self._n_last = keys.shape[-2]
        self._n_first = self._n_first or self._n_last
        self._before = None

    @property
    def is_due(self) -> bool:
        """Whether the budget is exceeded by more than the interval."""
        return self.budget is not None and self.n_stored > self.budget + self.interval

    def _cluster(self) -> None:
        """Compress to the budget where it is exceeded by more than the interval."""
        if not self.is_due:
            return
        begun = time.perf_counter()
        held, n_stored, n_recent = self._held, self.n_stored, self.n_recent
        # stored entries:  sinks | body | recent
        #                      start    stop
        start, stop = self.n_sink, n_stored - n_recent
        target = self.budget - start - n_recent
        new = move_to_room(held, start, held, self._with_room(self.budget))
        if held[0].numel():
            keys, values, counts = (with_four_axes(x[..., start:stop, :]) for x in held)
            compress = implementation("pooled_matching", self.backend, keys, values)
            compressed = compress(keys, values, counts.squeeze(-1), target=target, chunk_size=self.chunk_size)
            left = compressed.keys, compressed.values, compressed.counts.unsqueeze(-1)
            for room, entries in zip(new, left, strict=True):
                room[..., start : start + target, :] = entries.reshape(*room.shape[:-2], target, room.shape[-1])
            self.work.add(compressed.n_rows, compressed.n_scored_rows, 0.0)
        for room, old in zip(new, held, strict=True):
            room[..., start + target : self.budget, :] = old[..., stop:n_stored, :]
        if self._n_last <= UNDO_TOKENS:
            self._before = Before(held, n_stored, self._compressed_at)
        self._held, self._n_stored, self._compressed_at = new, self.budget, self.n_seen
        self.work.seconds += time.perf_counter() - begun

    def crop(self, n_tokens: int) -> None:
        """Remove the last `n_tokens` tokens: the cache is then, bit for bit, as if they had never come.

        Raises
        ------
        ValueError : more than `n_croppable`. The cache is then as it was.

        Notes
        -----
        Of the append that they came in, the tokens before them were appended without them. A compression that the last
        append caused, if of at most `UNDO_TOKENS` tokens, is undone, then done again if it is due for those left.
        """
        super().crop(n_tokens)

    def _crop(self, n_tokens: int) -> None:
        if n_tokens == 0:
            return
        if self._before is not None:
            self._held, self._n_stored, self._compressed_at = self._before
            self._before = None
        self.n_seen -= n_tokens
        self._n_stored -= n_tokens
        self._n_first = min(self._n_first, self.n_seen)
        self._cluster()

    def _select(self, indices: Int64[Tensor, " batch"]) -> None:
        super()._select(indices)
        if self._before is not None:
            held = tuple(tensor.index_select(0, indices) for tensor in self._before.held)
            self._before = self._before._replace(held=held)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """As that of `EntryCache`, with the numbers that tell when the next compression is due."""
        tensors, numbers = super().state()
        return tensors, numbers | {
            "n_first": self._n_first,
            "compressed_at": self._compressed_at,
        } if tensors else numbers

    def _restore(self, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        super()._restore(tensors, numbers)
        if tensors:
            self._n_first, self._compressed_at = numbers["n_first"], numbers["compressed_at"]
