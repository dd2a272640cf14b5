"""The online cache on torch tensors."""

import time

import torch
from jaxtyping import Float, Int32, Int64
from torch import Tensor

from .arguments import check_append, check_integer, check_keep_ratio, entries_of_chunk
from .backends import Backend
from .chunk_compression import compress
from .clustered_attention import clustered_attention
from .ordinary import on_ordinary_tensors
from .work import ClusteringWork

__all__ = ["ClusteredCache"]


class ClusteredCache:
    """A key-value cache whose old tokens are centroids: sinks, centroids of whole chunks, recent tokens.

    Defined, with parameters, attributes and errors, by `kvcluster.reference.ClusteredCache`: the same bytes, on the
    device of what is appended. `backend` as in `choose_backend`, for matching and merging.

    Notes
    -----
    Entries lie in memory with some room to grow (1 / 32 of them, at least one chunk): `nbytes` counts the entries,
    `nbytes_reserved` the memory. A token is appended and a chunk clustered in place, without a copy of the body. So
    `keys`, `values`, `counts` and what `append` returns are views that the next `append` may overwrite: clone what is
    to be kept.
    """

    def __init__(
        self,
        *,
        keep_ratio: float,
        chunk_size: int = 64,
        n_sink: int = 4,
        n_recent: int = 64,
        backend: Backend = "auto",
    ) -> None:
        check_keep_ratio(keep_ratio)
        check_integer("chunk_size", chunk_size, least=1)
        check_integer("n_sink", n_sink, least=0)
        check_integer("n_recent", n_recent, least=0)
        self.keep_ratio, self.chunk_size = keep_ratio, chunk_size
        self.n_sink, self.n_recent, self.backend = n_sink, n_recent, backend
        self.n_seen = 0
        self.n_clustered = 0
        self._n_stored = 0
        self._n_body = 0  # entries of the body
        self._held: tuple[Tensor, Tensor, Tensor] | None = None  # keys, values, counts with room to grow
        self.work = ClusteringWork()

    @property
    def n_body(self) -> int:
        """Entries of the body: centroids, each of a clustered chunk."""
        return self._n_body

    @property
    def n_stored(self) -> int:
        return self._n_stored

    @property
    def keys(self) -> Float[Tensor, "*lead entries dim"] | None:
        return None if self._held is None else self._held[0][..., : self.n_stored, :]

    @property
    def values(self) -> Float[Tensor, "*lead entries dim_value"] | None:
        return None if self._held is None else self._held[1][..., : self.n_stored, :]

    @property
    def counts(self) -> Int32[Tensor, "*lead entries"] | None:
        return None if self._held is None else self._held[2][..., : self.n_stored, 0]

    @property
    def nbytes(self) -> int:
        held = (self.keys, self.values, self.counts)
        return sum(view.nbytes for view in held if view is not None)

    @property
    def nbytes_reserved(self) -> int:
        """Bytes of memory held, room to grow included."""
        return 0 if self._held is None else sum(tensor.untyped_storage().nbytes() for tensor in self._held)

    def append(
        self, keys: Float[Tensor, "*lead tokens dim"], values: Float[Tensor, "*lead tokens dim_value"]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Take the next tokens, then cluster every whole chunk that has left the recent window.

        Returns keys, values and counts as they were just before this clustering, the new tokens last.
        """
        self.extend(keys, values)
        keys, values, counts = self.keys, self.values, self.counts
        if self._leaving:
            keys, values, counts = keys.clone(), values.clone(), counts.clone()
            self.cluster()
        return keys, values, counts

    def extend(self, keys: Tensor, values: Tensor) -> None:
        """The first half of `append`: take the next tokens, exact as yet."""
        check_append(keys, values, None if self._held is None else (self.keys, self.values))
        keys, values = keys.detach(), values.detach()  # no graph may hold on to them
        n_stored = self.n_stored + keys.shape[-2]
        if self._held is None or n_stored > self._held[0].shape[-2]:
            self._move_to_room_for(n_stored, (keys, values, keys[..., :1].to(torch.int32)))
        for held, new in zip(self._held[:2], (keys, values), strict=True):
            held[..., self.n_stored : n_stored, :] = new
        self._held[2][..., self.n_stored : n_stored, :] = 1
        self.n_seen += keys.shape[-2]
        self._n_stored = n_stored

    def cluster(self) -> None:
        """The second half of `append`: cluster every whole chunk that has left the recent window."""
        leaving = self._leaving
        if leaving == 0:
            return
        target = entries_of_chunk(self.keep_ratio, self.chunk_size)
        start = self.n_sink + self._n_body
        stop = start + leaving
        n_entries = leaving // self.chunk_size * target
        if target < self.chunk_size:
            begun = time.perf_counter()
            made = compress(
                self.keys[..., start:stop, :],
                self.values[..., start:stop, :],
                chunk_size=self.chunk_size,
                target=target,
                backend=self.backend,
            )
            for held, chunks in zip(self._held, (made.keys, made.values, made.counts.unsqueeze(-1)), strict=True):
                recent = held[..., stop : self.n_stored, :].clone()
                held[..., start : start + n_entries, :] = chunks.reshape(*held.shape[:-2], n_entries, held.shape[-1])
                held[..., start + n_entries : start + n_entries + recent.shape[-2], :] = recent
            self.work.add(made.n_rows, made.n_scored_rows, time.perf_counter() - begun)
        self.n_clustered += leaving
        self._n_body += n_entries
        self._n_stored -= leaving - n_entries
        if self._held[0].shape[-2] > self._with_room(self.n_stored + self.chunk_size):
            self._move_to_room_for(self.n_stored, self._held)

    def attend(
        self, query: Float[Tensor, "*lead queries dim"], *, scale: float | None = None
    ) -> Float[Tensor, "*lead queries dim_value"]:
        """Clustered attention of `query` (..., queries, dim) to all stored entries."""
        if self.keys is None:
            raise ValueError("attend needs at least one appended token, got an empty cache")
        return clustered_attention(query, self.keys, self.values, self.counts, scale=scale)

    @on_ordinary_tensors
    def select(self, indices: Int64[Tensor, " batch"]) -> None:
        """Keep the rows `indices` of the first axis, in their order; a row may be taken more than once (beams)."""
        if self._held is not None:
            keys, values, counts = (tensor.index_select(0, indices) for tensor in self._held)
            self._held = keys, values, counts

    def state(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Tensors and integers that `restore` makes the same cache of; no tensors before the first `append`."""
        if self._held is None:
            return {}, {}
        tensors = {"keys": self.keys, "values": self.values, "counts": self.counts}
        return tensors, {"n_seen": self.n_seen, "n_clustered": self.n_clustered, "n_body": self._n_body}

    def restore(self, tensors: dict[str, Tensor], numbers: dict[str, int]) -> None:
        """Hold copies of what `state` gave of a cache with the same parameters; this one must be empty."""
        if tensors:
            self.extend(tensors["keys"], tensors["values"])
            self.counts.copy_(tensors["counts"])
            self.n_seen, self.n_clustered, self._n_body = (numbers[x] for x in ("n_seen", "n_clustered", "n_body"))

    @property
    def _leaving(self) -> int:
        """Tokens in whole chunks that have left the recent window and are not clustered yet."""
        recent = max(0, self.n_seen - self.n_sink - self.n_clustered)
        return max(0, recent - self.n_recent) // self.chunk_size * self.chunk_size

    def _with_room(self, entries: int) -> int:
        """Entries to hold memory for when there are `entries`."""
        return entries + max(self.chunk_size, entries // 32)

    @on_ordinary_tensors
    def _move_to_room_for(self, entries: int, like: tuple[Tensor, Tensor, Tensor]) -> None:
        """Move what is stored to memory with room for `entries` and some more, one tensor after the other."""
        moved = []
        for place, example in enumerate(like):
            shape = (*example.shape[:-2], self._with_room(entries), example.shape[-1])
            room = torch.empty(shape, dtype=example.dtype, device=example.device)
            if self._held is not None:
                room[..., : self.n_stored, :] = self._held[place][..., : self.n_stored, :]
            moved.append(room)
        self._held = moved[0], moved[1], moved[2]
