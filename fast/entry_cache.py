"""What every clustered cache holds, on torch tensors: entries with room to grow, and every token of whole heads."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int32, Int64
from torch import Tensor

from .arguments import check_append, check_axis_of_rows, check_heads, check_query
from .attention import attend_entries
from .clustered_attention import clustered_attention
from .memory.changes import AllOrNothing
from .memory.room import LEAST_ROOM, move_to_room, with_room
from .memory.whole_heads import apart, heads_apart, in_order, together
from .memory.work import ClusteringWork
from .scalars import check_whole_heads

__all__ = ["UNDO_TOKENS", "EntryCache"]

# `crop` can take out an append of at most so many tokens, whatever was clustered because of them.
UNDO_TOKENS = 256


class EntryCache(AllOrNothing):
    """Keys, values and counts of a layer, before any rule of what is clustered.

    Defined, with attributes and errors, by `kvcluster.reference.entry_cache.EntryCache`: the same bytes, on the device
    of what is appended.

    Parameters
    ----------
    whole_heads : KV heads that keep every token.

    Notes
    -----
    Entries lie in memory with some room to grow (1 / 32 of them, at least 64 or a chunk): `nbytes` counts the entries,
    `nbytes_reserved` the memory. So `keys`, `values`, `counts` and what `append` returns are views that the next
    `append` may overwrite: clone what is to be kept. Without whole heads nothing is copied but the new tokens.
    """

    def __init__(self, whole_heads: Sequence[int]) -> None:
        self.whole_heads = check_whole_heads(whole_heads)
        self.n_seen = 0
        self._least_room = LEAST_ROOM  # rows of room to grow, at least
        self._n_stored = 0  # rows of `_held` that are entries
        self._held: tuple[Tensor, ...] | None = None  # keys, values, counts with room to grow
        self._whole: tuple[Tensor, ...] | None = None  # keys and values of whole heads, with room to grow
        self.work = ClusteringWork()

    @property
    def n_stored(self) -> int:
        return self._n_stored

    @property
    def is_quantized(self) -> bool:
        """Whether any entry is quantized."""
        return False

    @property
    def width(self) -> int:
        """Entries that a query may attend to in the head that has most of them."""
        return self.n_seen if self.whole_heads else self.n_stored

    @property
    def mean_entries(self) -> float:
        """Entries per head, the mean of all heads; a whole number without whole heads."""
        if not self.whole_heads or self._held is None:
            return self.n_stored
        others, whole = self._held[0].shape[-3], len(self.whole_heads)
        return (others * self.n_stored + whole * self.n_seen) / (others + whole)

    @property
    def keys(self) -> Float[Tensor, "*lead entries dim"] | None:
        return None if self._held is None else self._held[0].narrow(-2, 0, self._n_stored)

    @property
    def values(self) -> Float[Tensor, "*lead entries dim_value"] | None:
        return None if self._held is None else self._held[1].narrow(-2, 0, self._n_stored)

    @property
    def counts(self) -> Int32[Tensor, "*lead entries"] | None:
        return None if self._held is None else self._held[2].squeeze(-1).narrow(-1, 0, self._n_stored)

    @property
    def whole_keys(self) -> Float[Tensor, "*lead tokens dim"] | None:
        return None if self._whole is None else self._whole[0][..., : self.n_seen, :]

    @property
    def whole_values(self) -> Float[Tensor, "*lead tokens dim_value"] | None:
        return None if self._whole is None else self._whole[1][..., : self.n_seen, :]

    @property
    def n_rows(self) -> int:
        """Size of the first leading axis; 0 at first."""
        return 0 if self._held is None else len(self._held[0])

    @property
    def nbytes(self) -> int:
        views = (self.keys, self.values, self.counts, self.whole_keys, self.whole_values)
        return sum(view.nbytes for view in views if view is not None)

    @property
    def n_numbers(self) -> int:
        """Numbers of keys and values that are held in the dtype of the cache, as all are that are not quantized."""
        views = (self.keys, self.values, self.whole_keys, self.whole_values)
        return sum(view.numel() for view in views if view is not None)

    @property
    def nbytes_reserved(self) -> int:
        """Bytes of memory held, with room to grow."""
        return sum(tensor.untyped_storage().nbytes() for tensor in (*(self._held or ()), *(self._whole or ())))

    def append(
        self, keys: Float[Tensor, "*lead tokens dim"], values: Float[Tensor, "*lead tokens dim_value"]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Take the next tokens, then cluster what is due.

        Returns keys, values and counts of all heads as they were just before this clustering, the new tokens last.
        """
        self.check_new(keys, values)
        seen: tuple[Tensor, Tensor, Tensor] = self._append(keys, values)
        return seen

    def _seen(self) -> tuple[Tensor, ...] | None:
        seen = self.entries()
        return tuple(array.clone() for array in seen) if seen is not None and self.is_due else seen

    def _extend(self, keys: Tensor, values: Tensor) -> None:
        keys, values = keys.detach(), values.detach()  # no graph may hold on to them
        n_new = keys.shape[-2]
        of_whole: tuple[Tensor, ...] = ()
        if self.whole_heads:
            (keys, whole_keys), (values, whole_values) = (apart(x, self.whole_heads) for x in (keys, values))
            of_whole = whole_keys, whole_values
        counts = keys[..., :1].to(torch.int32) if self._held is None else self._held[2]
        like = keys, values, counts
        # all memory there is to get before anything is written
        held, whole = (
            self._with_rows(self._held, self._n_stored, self._n_stored + n_new, like),
            self._with_rows(self._whole, self.n_seen, self.n_seen + n_new, of_whole) if self.whole_heads else None,
        )
        for room, new in zip(held[:2], (keys, values), strict=True):
            room.narrow(-2, self._n_stored, n_new).copy_(new)
        held[2].narrow(-2, self._n_stored, n_new).fill_(1)
        for room, new in zip(whole or (), of_whole, strict=True):
            room.narrow(-2, self.n_seen, n_new).copy_(new)
        self._held, self._whole, self._n_stored = held, whole, self._n_stored + n_new
        self.n_seen += n_new

    def check_new(self, keys: Tensor, values: Tensor) -> None:
        """Refuse tokens that cannot be appended."""
        check_append(keys, values, self.like)
        check_heads(self.whole_heads, tuple(keys.shape))

    def _cluster(self) -> None:
        """There is no rule here."""

    def attend(
        self, query: Float[Tensor, "*lead queries dim"], *, scale: float | None = None
    ) -> Float[Tensor, "*lead queries dim_value"]:
        """Clustered attention of `query` (..., queries, dim) to all stored entries."""
        if self.keys is None or self.values is None or self.counts is None:
            raise ValueError("attend needs at least one appended token, got an empty cache")
        if not self.whole_heads:
            return clustered_attention(query, self.keys, self.values, self.counts, scale=scale)
        like = self.like
        check_query(query, None if like is None else like[0])
        output = self.attend_rows(with_batch(query, 3), queries=1, scale=scale)
        return output.reshape(*query.shape[:-1], output.shape[-1])

    def attend_rows(
        self, query: Float[Tensor, "batch heads rows dim"], *, queries: int, scale: float | None
    ) -> Float[Tensor, "batch heads rows dim_value"]:
        """As `attend_entries`, each head to what it stores: one call for clustered heads, one for whole ones."""
        keys, values, counts = (with_batch(x, n) for x, n in ((self.keys, 3), (self.values, 3), (self.counts, 2)))
        if self.whole_keys is None or self.whole_values is None:
            return attend_entries(query, keys, values, counts, queries=queries, scale=scale)
        of_whole = with_batch(self.whole_keys, 3), with_batch(self.whole_values, 3)
        others, whole = heads_apart(query.shape[1], self.whole_heads, query.device)
        output = attend_entries(query.index_select(1, whole), *of_whole, None, queries=queries, scale=scale)
        if not len(others):
            return output
        clustered = attend_entries(query.index_select(1, others), keys, values, counts, queries=queries, scale=scale)
        return in_order(clustered, output, self.whole_heads, 1)

    def entries(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """Keys, values and counts of all heads in their order; None at first.

        With whole heads there are `n_seen` entries; those of the other heads come last, after zeros of count 0.
        """
        if self.keys is None or self.values is None or self.counts is None:
            return None
        if self.whole_keys is None or self.whole_values is None:
            return self.keys, self.values, self.counts
        stored = self.keys, self.values, self.counts
        return together(*stored, self.whole_keys, self.whole_values, self.whole_heads)

    @property
    def like(self) -> tuple[Tensor, ...] | None:
        """Tensors of the shape of keys and values of all heads, without memory of their own; None at first."""
        keys, values = self.keys, self.values
        if keys is None or values is None:
            return None
        if not self.whole_heads:
            return keys, values
        heads = keys.shape[-3] + len(self.whole_heads)
        shapes = ((*x.shape[:-3], heads, self.n_seen, x.shape[-1]) for x in (keys, values))
        return tuple(x.new_empty(()).expand(shape) for x, shape in zip((keys, values), shapes, strict=True))

    def _select(self, indices: Int64[Tensor, " batch"]) -> None:
        if self.whole_heads and self.keys is not None:
            check_axis_of_rows(self.keys.ndim - 3)
        if self._held is not None:
            self._held = tuple(tensor.index_select(0, indices) for tensor in self._held)
        if self._whole is not None:
            self._whole = tuple(tensor.index_select(0, indices) for tensor in self._whole)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and numbers from which `restore` makes the same cache; no tensors before the first `append`.

        What `crop` would undo is not part of the state.
        """
        views = {name: getattr(self, name) for name in ("keys", "values", "counts", "whole_keys", "whole_values")}
        tensors = {name: view for name, view in views.items() if view is not None}
        return tensors, {"n_seen": self.n_seen} if tensors else {}

    def _restore(self, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        if not tensors:
            return
        check_append(tensors["keys"], tensors["values"], None)
        stored = tensors["keys"], tensors["values"], tensors["counts"].unsqueeze(-1)
        self._n_stored, self.n_seen = stored[0].shape[-2], numbers["n_seen"]
        self._held = self._with_rows(stored, self._n_stored, self._n_stored, stored, is_moved=True)
        if self.whole_heads:
            check_append(tensors["whole_keys"], tensors["whole_values"], None)
            whole = tensors["whole_keys"], tensors["whole_values"]
            self._whole = self._with_rows(whole, self.n_seen, self.n_seen, whole, is_moved=True)

    def _with_rows(
        self, held: tuple[Tensor, ...] | None, n_kept: int, rows: int, like: tuple[Tensor, ...], is_moved: bool = False
    ) -> tuple[Tensor, ...]:
        """`held` if it has memory for so many rows, else new memory with room to grow that holds its first `n_kept`."""
        if held is not None and rows <= held[0].shape[-2] and not is_moved:
            return held
        return move_to_room(held, n_kept, like, self._with_room(rows))

    def _with_room(self, rows: int) -> int:
        return with_room(rows, least=self._least_room)


def with_batch(array: Tensor, n_axes: int) -> Tensor:
    """`array` with its last `n_axes` axes, those of a layer, behind one axis for all others."""
    if array.ndim == n_axes + 1:
        return array
    return array.reshape(array.shape[:-n_axes].numel(), *array.shape[-n_axes:])
