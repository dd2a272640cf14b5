"""What a recall cache holds: sinks, a body in the order of its clusters, recent tokens; before any query."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
from jaxtyping import Int64
from torch import Tensor

from .arguments import check_append, check_half_range
from .backends import AnyBackend, choose
from .entry_cache import UNDO_TOKENS
from .exact.blocks import put_in
from .exact.entries import rows_of
from .memory.body_clusters import BodyClusters
from .memory.changes import AllOrNothing, selected
from .memory.fast_tier import FastTier, TierStatistics
from .memory.packed_tokens import PackedTokens
from .memory.room import move_to_room, with_room
from .memory.segments import RecallSettings

__all__ = ["RecallTokens"]

PACKED = "packed_keys", "packed_values"  # names of saved tensors, (problems, tokens, nbytes)
BEFORE = "n_clustered_before", "n_clusters_before"  # names, in saved numbers, of what was there before the last append


class RecallTokens(AllOrNothing):
    """All tokens of a recall cache and the clusters of its body.

    With bits below 16 the body lies in `PackedTokens`, and `_held` are sinks and recent tokens alone.
    """

    body_class: ClassVar[type[BodyClusters]] = BodyClusters
    _kept_for_good = "clusters that are older than the last append stay whole"

    def _begin(self, settings: RecallSettings, backend: AnyBackend) -> None:
        self.settings, self.backend = settings, backend
        self.body = self.body_class(settings)
        self.n_seen, self._is_prompt = 0, True  # tokens; whether the last append was the first
        self._before: tuple[int, ...] = 0, 0  # tokens and clusters of the body before the last append
        self._held: tuple[Tensor, ...] | None = None  # keys and values (..., room, dim)
        self._packed: PackedTokens | None = None  # with bits, the body
        self._lost: tuple[Tensor, ...] | None = None  # with bits: tokens (problems, tokens, .) clustered just now
        self._near: FastTier | None = None  # what steps have read back, or brought
        self._near_backend, self.statistics = "auto", TierStatistics()

    @property
    def stored(self) -> tuple[Tensor, Tensor]:
        """Keys and values (..., n_seen, .) as they lie in memory: sinks, body in cluster order, recent tokens.

        With bits, copies in which the body is as it is read back.
        """
        keys, values = (array[..., : self._n_held, :] for array in self._held)
        if self._packed is None or self._packed.n_tokens == 0:
            return keys, values
        read = map(self._with_leads, self._packed.read(self._packed.held()))
        keys, values = (put_in(x, self.settings.n_sink, y, -2) for x, y in zip((keys, values), read, strict=True))
        return keys, values

    @property
    def bits(self) -> tuple[int, int] | None:
        """Bits of keys and of values of the body; None where these are as they came."""
        return self.settings.of_bits

    @property
    def like(self) -> tuple[Tensor, ...] | None:
        """Tensors of the shape of keys and values of all heads, without memory of their own; None at first."""
        if self._held is None:
            return None
        shapes = ((*x.shape[:-2], self.n_seen, x.shape[-1]) for x in self._held)
        return tuple(x.new_empty(()).expand(shape) for x, shape in zip(self._held, shapes, strict=True))

    @property
    def _n_held(self) -> int:
        """Tokens that lie in `_held`."""
        return self.n_seen - (0 if self._packed is None else self.n_clustered)

    @property
    def n_clustered(self) -> int:
        return self.body.n_tokens

    @property
    def n_croppable(self) -> int:
        """The most tokens that `crop` takes out: clusters that are older than the last append stay whole."""
        return self.n_seen - self.settings.fewest_seen(self._before[0])

    @property
    def n_rows(self) -> int:
        """Size of the first leading axis; 0 at first."""
        return 0 if self._held is None else len(self._held[0])

    @property
    def nbytes(self) -> int:
        if self._held is None:
            return self.body.nbytes
        of_held = sum(array[..., : self._n_held, :].nbytes for array in self._held)
        return self.body.nbytes + of_held + (0 if self._packed is None else self._packed.nbytes)

    @property
    def nbytes_reserved(self) -> int:
        """Bytes of memory held, room to grow included."""
        held = *(self._held or ()), *(self._lost or ()), *(() if self._near is None else self._near.held)
        of_body = self.body.nbytes + (0 if self._packed is None else self._packed.nbytes_reserved)
        return of_body + sum(tensor.untyped_storage().nbytes() for tensor in held)

    def check_new(self, keys: Tensor, values: Tensor) -> None:
        check_append(keys, values, self._held)
        if self.settings.is_centred:
            check_half_range("keys", keys, "with is_centred")
        if self.settings.of_bits is not None:
            check_half_range("keys", keys, "to be quantized")
            check_half_range("values", values, "to be quantized")

    def _extend(self, keys: Tensor, values: Tensor) -> None:
        if keys.shape[-2] == 0 and self._held is not None:
            return
        n_held = self._n_held
        end = n_held + keys.shape[-2]
        if self._held is None:
            self.body.backend = self._near_backend = self._step_backend(keys, values)
            self.body.n_heads = 1 if keys.ndim == 2 else keys.shape[-3]
        if self._held is None or end > self._held[0].shape[-2]:
            self._move_to_room_for(end, (keys, values))
        if self.settings.of_bits is not None and self._packed is None:
            like = self._flat(keys), self._flat(values)
            self._packed = PackedTokens(like, self.settings.of_bits, self._allocator())
        for held, new in zip(self._held, (keys, values), strict=True):
            held[..., n_held:end, :] = new.detach()
        self._is_prompt = self.n_seen == 0
        self._before, self._lost = (self.n_clustered, self.body.n_clusters), None
        self.n_seen += keys.shape[-2]

    def _step_backend(self, keys: Tensor, values: Tensor) -> str:
        """What selects and attends for such keys and values."""
        return choose("attend_recalled", self.backend, keys.detach(), values.detach())

    @property
    def _sizes_due(self) -> list[int]:
        """Sizes of the segments that are due."""
        leaving = max(0, self.n_seen - self.settings.n_sink - self.n_clustered - self.settings.n_recent)
        return self.settings.sizes(leaving, is_first=self._is_prompt)

    @property
    def is_due(self) -> bool:
        return bool(self._sizes_due)

    def _cluster(self) -> None:
        """Cluster every segment that is due."""
        sizes = self._sizes_due
        start = self.settings.n_sink
        if self._packed is not None:
            self._keep_last(sizes)
        for size in dict.fromkeys(sizes):  # those of one size together
            segments = sizes.count(size)
            if self._packed is None:
                start = self.settings.n_sink + self.n_clustered
            parts = [self._flat(array)[:, start : start + segments * size] for array in self._held]
            if self._packed is None:
                places = self._add_to_body(parts[0], parts[1], size)
                for part, held in zip(parts, self._held, strict=True):
                    part.copy_(rows_of(self._flat(held), start + places))
            else:
                self._pack(self._packed, parts, size)
        if self._packed is not None and self._held[0].shape[-2] > 2 * (self._n_held + self.settings.segment_size):
            self._move_to_room_for(self._n_held, self._held)  # a prompt has left it

    def _keep_last(self, sizes: list[int]) -> None:
        """Keep exact what `crop` may need of the tokens that segments of these sizes quantize: the last segments."""
        for_good = sizes[: self.settings.n_for_good(sizes, UNDO_TOKENS)]
        first, end = (self.settings.n_sink + sum(of) for of in (for_good, sizes))
        if first < end:
            self._lost = tuple(self._flat(x)[:, first:end].clone() for x in self._held)
        n_clusters = self.body.n_clusters + sum(map(self.settings.n_clusters, for_good))
        self._before = self.n_clustered + sum(for_good), n_clusters

    def _add_to_body(self, keys: Tensor, values: Tensor, size: int) -> Tensor:
        """Cluster tokens (problems, tokens, .) in segments of `size`; their places in the order of the clusters."""
        shape = keys.shape[1] // size, size
        n_clusters = self.settings.n_clusters(size)
        return self.body.add(keys.unflatten(1, shape), values.unflatten(1, shape), n_clusters=n_clusters)

    def _pack(self, packed: PackedTokens, parts: list[Tensor], size: int) -> None:
        """Cluster the tokens `parts`, the first behind the sinks, in segments of `size`, and quantize each."""
        n_held, start, n = self._n_held, self.settings.n_sink, parts[0].shape[1]
        rows = packed.packed(tuple(parts))
        values = packed.read(rows)[1] if self.settings.centroids_for_rest else parts[1]
        places = self._add_to_body(parts[0], values, size)
        packed.add(tuple(rows_of(of, places) for of in rows))
        for held in map(self._flat, self._held):
            held[:, start : n_held - n] = held[:, start + n : n_held].clone()

    def _crop(self, n_tokens: int) -> None:
        """Clusters that the last append made with the tokens are made again without them, at the cost of `cluster`."""
        n_left = self.n_seen - n_tokens
        is_clustered_anew = n_left < self.settings.fewest_seen(self.n_clustered)
        if is_clustered_anew:
            self._drop_clusters_of_last_append()
        self.n_seen = n_left
        if is_clustered_anew:
            self._cluster()
        if n_tokens > 0 and n_left == 0:
            self._held = self._packed = self._near = self._lost = None
        if self._near is not None and n_tokens > 0:
            self._near.keep(self._before[1], min(self.settings.n_sink, self.n_seen))

    def _select(self, indices: Int64[Tensor, " batch"]) -> None:
        if self._held is None:
            return
        problems = torch.arange(self._held[0].shape[:-2].numel(), device=indices.device).reshape(self.n_rows, -1)
        self._select_problems(problems.index_select(0, indices).flatten())
        self._held = tuple(array.index_select(0, indices) for array in self._held)

    def _select_problems(self, problems: Int64[Tensor, " problems"]) -> None:
        """Keep these problems of all that has one axis for them."""
        self.body = selected(self.body, problems)
        self._packed = self._packed and selected(self._packed, problems)
        self._near = self._near and selected(self._near, problems)
        if self._lost is not None:
            self._lost = tuple(array.index_select(0, problems.to(array.device)) for array in self._lost)

    def state(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Tensors and integers from which `restore` makes the same cache; no tensors before the first `append`."""
        if self._held is None:
            return {}, {}
        held = (array[..., : self._n_held, :] for array in self._held)
        tensors = dict(zip(("keys", "values"), held, strict=True)) | self.body.state()
        if self._packed is not None:
            tensors |= dict(zip(PACKED, self._packed.held(), strict=True))
        numbers = {"n_seen": self.n_seen, "n_clustered": self.n_clustered, "is_prompt": self._is_prompt}
        before = (self.n_clustered, self.body.n_clusters) if self._packed is not None else self._before
        return tensors, numbers | dict(zip(BEFORE, before, strict=True))

    def restore(self, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        """Take over copies of the `state` of a cache with the same parameters; this one must be empty.

        What could be cropped there can be cropped here. Numbers that an older version wrote do not say what the last
        append clustered: then all clusters stay whole, as they do with bits.
        """
        super().restore(tensors, numbers)

    def _restore(self, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        if tensors:
            self.extend(tensors["keys"], tensors["values"])
            self._is_prompt = bool(numbers["is_prompt"])
            self.body = copy.copy(self.body)
            self.body.restore(tensors)
            if self._packed is not None:
                self._packed.add(tuple(tensors[name].to(self._held[0].device) for name in PACKED))
            self.n_seen = numbers["n_seen"]
            now = self.n_clustered, self.body.n_clusters
            self._before = tuple(numbers.get(name, number) for name, number in zip(BEFORE, now, strict=True))

    def _drop_clusters_of_last_append(self) -> None:
        """Forget these clusters and put their tokens back into the order in which they came."""
        n_clustered, n_clusters = self._before
        if self._packed is not None:
            self._put_back(self._lost)
            self.body.drop(n_clustered, n_clusters)
            self._packed.n_tokens = n_clustered
            return
        start = self.settings.n_sink + n_clustered
        places = self.body.drop(n_clustered, n_clusters).to(self._held[0].device)
        for held in map(self._flat, self._held):
            held[:, start : start + places.shape[1]] = rows_of(held, start + places)

    def _put_back(self, lost: tuple[Tensor, ...]) -> None:
        """Tokens that were quantized come behind the sinks again, exact."""
        n_held, n_lost, n_sink = self._n_held, lost[0].shape[1], self.settings.n_sink
        if n_held + n_lost > self._held[0].shape[-2]:
            self._move_to_room_for(n_held + n_lost, self._held)
        for held, rows in zip(map(self._flat, self._held), lost, strict=True):
            held[:, n_sink + n_lost : n_held + n_lost] = held[:, n_sink:n_held].clone()
            held[:, n_sink : n_sink + n_lost] = rows

    @property
    def _n_exact(self) -> int:
        """Tokens that are always attended to: sinks and recent ones."""
        return self.n_seen - self.n_clustered

    def _flat(self, array: Tensor) -> Tensor:
        """`array` (..., rows, dim) with one leading axis."""
        return array.reshape(array.shape[:-2].numel(), *array.shape[-2:])

    def _with_leads(self, array: Tensor) -> Tensor:
        """`array` (problems, ...) with the leading axes of what was appended."""
        return array.reshape(*self._held[0].shape[:-2], *array.shape[1:])

    def _move_to_room_for(self, tokens: int, like: tuple[Tensor, ...]) -> None:
        """Move what is stored to memory with room for `tokens` and some more."""
        rows = with_room(tokens, least=self.settings.segment_size)
        self._held = move_to_room(self._held, self._n_held, like, rows)

    def _allocator(self) -> Callable[[tuple[int, ...]], Tensor]:
        """What makes memory for quantized tokens."""
        return partial(torch.empty, dtype=torch.uint8, device=self._held[0].device)
