"""The online cache on torch tensors."""

import torch
from jaxtyping import Float, Int32, Int64
from torch import Tensor

from .arguments import check_array, check_integer, check_keep_ratio, dtype_name, entries_of_chunk
from .backends import Backend
from .chunk_compression import compress
from .clustered_attention import clustered_attention

__all__ = ["ClusteredCache"]


class ClusteredCache:
    """A key-value cache whose old tokens are centroids: sinks, centroids of whole chunks, recent tokens.

    Defined, with parameters, attributes and errors, by `kvcluster.reference.ClusteredCache`: the same bytes, on the
    device of what is appended. `nbytes` counts the memory that the tensors really hold. `backend`
    as in `choose_backend`.
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
        self.keys: Float[Tensor, "*lead entries dim"] | None = None
        self.values: Float[Tensor, "*lead entries dim_value"] | None = None
        self.counts: Int32[Tensor, "*lead entries"] | None = None
        self.n_seen = 0
        self.n_clustered = 0
        self._n_body = 0  # entries of the body

    @property
    def n_stored(self) -> int:
        return 0 if self.keys is None else self.keys.shape[-2]

    @property
    def nbytes(self) -> int:
        held = (self.keys, self.values, self.counts)
        return sum(tensor.untyped_storage().nbytes() for tensor in held if tensor is not None)

    def append(
        self, keys: Float[Tensor, "*lead tokens dim"], values: Float[Tensor, "*lead tokens dim_value"]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Take the next tokens, then cluster every whole chunk that has left the recent window.

        Returns keys, values and counts as they were just before this clustering, the new tokens last.
        """
        self._check(keys, values)
        keys, values = keys.detach(), values.detach()  # no graph may hold on to them
        counts = torch.ones(keys.shape[:-1], dtype=torch.int32, device=keys.device)
        if self.keys is None:
            keys, values = keys.clone(), values.clone()  # what the caller does to its tensors later is its own business
        else:
            keys = torch.cat([self.keys, keys], dim=-2)  # (..., entries, dim)
            values = torch.cat([self.values, values], dim=-2)
            counts = torch.cat([self.counts, counts], dim=-1)
        self.n_seen += keys.shape[-2] - self.n_stored
        self.keys, self.values, self.counts = keys, values, counts
        self._cluster_what_left_the_window()
        return keys, values, counts

    def attend(
        self, query: Float[Tensor, "*lead queries dim"], *, scale: float | None = None
    ) -> Float[Tensor, "*lead queries dim_value"]:
        """Clustered attention of `query` (..., queries, dim) to all stored entries."""
        if self.keys is None:
            raise ValueError("attend needs at least one appended token, got an empty cache")
        return clustered_attention(query, self.keys, self.values, self.counts, scale=scale)

    def select(self, indices: Int64[Tensor, " batch"]) -> None:
        """Keep the rows `indices` of the first axis, in their order; a row may be taken more than once (beams)."""
        if self.keys is not None:
            self.keys, self.values, self.counts = (
                tensor.index_select(0, indices) for tensor in (self.keys, self.values, self.counts)
            )

    def _cluster_what_left_the_window(self) -> None:
        recent = max(0, self.n_seen - self.n_sink - self.n_clustered)
        leaving = max(0, recent - self.n_recent) // self.chunk_size * self.chunk_size
        if leaving == 0:
            return
        start = self.n_sink + self._n_body
        stop = start + leaving
        target = entries_of_chunk(self.keep_ratio, self.chunk_size)
        made = compress(
            self.keys[..., start:stop, :],
            self.values[..., start:stop, :],
            chunk_size=self.chunk_size,
            target=target,
            backend=self.backend,
        )
        n_entries = leaving // self.chunk_size * target

        def replaced(array: Tensor, chunks: Tensor) -> Tensor:
            """`array` with the tokens from start to stop replaced by `chunks`, rounded to its dtype."""
            centroids = chunks.to(array.dtype).reshape(*array.shape[:-2], n_entries, array.shape[-1])
            return torch.cat([array[..., :start, :], centroids, array[..., stop:, :]], dim=-2)

        self.keys, self.values = replaced(self.keys, made.keys), replaced(self.values, made.values)
        self.counts = replaced(self.counts.unsqueeze(-1), made.counts.unsqueeze(-1)).squeeze(-1)
        self.n_clustered += leaving
        self._n_body += n_entries

    def _check(self, keys: Tensor, values: Tensor) -> None:
        check_array("keys", keys)
        check_array("values", values)
        shapes = f"got values {tuple(values.shape)} and keys {tuple(keys.shape)}"
        if values.shape[:-1] != keys.shape[:-1]:
            raise ValueError(f"values must have the leading axes and tokens of keys, {shapes}")
        for name, new, held in (("keys", keys, self.keys), ("values", values, self.values)):
            if held is None:
                continue
            if new.shape[:-2] != held.shape[:-2] or new.shape[-1] != held.shape[-1]:
                raise ValueError(
                    f"{name} must fit what the cache holds, got {tuple(new.shape)} after {tuple(held.shape)}"
                )
            if new.dtype != held.dtype:
                raise ValueError(f"{name} must have the dtype of the cache, {dtype_name(held)}, got {dtype_name(new)}")
            if new.device != held.device:
                raise ValueError(f"{name} must be on the device of the cache, {held.device}, got {new.device}")
