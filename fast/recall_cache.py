"""The recall cache on torch tensors: all tokens are kept and clustered as they arrive, few are attended to."""

from dataclasses import asdict
from typing import ClassVar

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from .arguments import check_append, check_half_range, check_integer, check_query
from .backends import AnyBackend, choose
from .exact.clusters import Clusters
from .exact.entries import Reached, rows_of
from .memory.body_clusters import BodyClusters
from .memory.ordinary import on_ordinary_tensors
from .memory.room import move_to_room, with_room
from .memory.segments import RecallSettings
from .memory.step import RecallStep
from .memory.work import ClusteringWork
from .selection import Selection

__all__ = ["RecallCache"]

BEFORE = "n_clustered_before", "n_clusters_before"  # names, in saved numbers, of what was there before the last append


class RecallCache:
    """A key-value cache that forgets nothing and attends to at most `budget` tokens per KV head.

    Defined, with parameters, attributes and errors, by `kvcluster.reference.RecallCache`: the same clusters and the
    same recalled tokens, on the device of what is appended. `backend`, as in `choose`, is that of decoding steps.

    Notes
    -----
    The tokens of a cluster lie side by side in memory, so that recalling it reads one span. There is room to grow (1 /
    32 of the tokens, at least one segment): `nbytes` counts what is there, `nbytes_reserved` the memory. Appending a
    token moves others only where the room ends, clustering a segment moves only its own. `stored` are views that the
    next `append` may overwrite, enough for dense attention; `keys` and `values` are copies once there is a body.
    A step reads centroids and deviations, in bfloat16, and `budget` keys and values. No gradient flows through it.
    """

    body_class: ClassVar[type[BodyClusters]] = BodyClusters

    def __init__(
        self,
        *,
        budget: int,
        n_sink: int = 16,
        n_recent: int = 1,
        tokens_per_cluster: int = 8,
        segment_size: int | None = None,
        prompt_segment_size: int | None = 512,
        max_iter: int = 4,
        is_centred: bool = False,
        spread: float = 0.5,
        centroids_for_rest: bool = False,
        init_seed: int | None = None,
        is_per_query_head: bool = False,
        is_exact_counted: bool = True,
        backend: AnyBackend = "auto",
    ) -> None:
        sizes = budget, n_sink, n_recent, tokens_per_cluster, segment_size, prompt_segment_size
        clustering = max_iter, is_centred, spread, centroids_for_rest, init_seed
        self._begin(RecallSettings(*sizes, *clustering, is_per_query_head, is_exact_counted), backend)

    @classmethod
    def as_published(cls, *, budget: int, seed: int = 0, backend: AnyBackend = "auto") -> "RecallCache":
        """An empty cache with the settings of the paper, see `kvcluster.reference.RecallCache.as_published`."""
        return cls(**asdict(RecallSettings.as_published(budget=budget, seed=seed)), backend=backend)

    def _begin(self, settings: RecallSettings, backend: AnyBackend) -> None:
        self.settings, self.backend = settings, backend
        self.body = self.body_class(settings)
        self.n_seen, self._is_prompt = 0, True  # tokens; whether the last append was the first
        self._before: tuple[int, ...] = 0, 0  # tokens and clusters of the body before the last append
        self._held: tuple[Tensor, ...] | None = None  # keys and values (..., room, dim)

    @property
    def keys(self) -> Float[Tensor, "*lead tokens dim"] | None:
        return None if self._held is None else self._in_order_of_arrival(self.stored[0])

    @property
    def values(self) -> Float[Tensor, "*lead tokens dim_value"] | None:
        return None if self._held is None else self._in_order_of_arrival(self.stored[1])

    @property
    def stored(self) -> tuple[Tensor, Tensor]:
        """Keys and values (..., n_seen, .) as they lie in memory: sinks, body in cluster order, recent tokens."""
        return self._held[0][..., : self.n_seen, :], self._held[1][..., : self.n_seen, :]

    like = stored  # the shapes of keys and values of all heads

    @property
    def clusters(self) -> Clusters | None:
        if self.body.scored is None:
            return None
        arrays = self.body.labels(), self.body.counts, self.body.scored.centroids
        return Clusters(*map(self._with_leads, arrays))

    @property
    def deviations(self) -> Float32[Tensor, "*lead clusters dim"] | None:
        return None if self.body.scored is None else self._with_leads(self.body.scored.deviations)

    @property
    def n_stored(self) -> int:
        return self.n_seen

    width = mean_entries = n_stored  # every KV head holds every token

    @property
    def work(self) -> ClusteringWork:
        return self.body.work

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
        return self.body.nbytes + (0 if self._held is None else sum(view.nbytes for view in self.stored))

    @property
    def nbytes_reserved(self) -> int:
        """Bytes of memory held, room to grow included."""
        return self.body.nbytes + sum(tensor.untyped_storage().nbytes() for tensor in self._held or ())

    def append(self, keys: Float[Tensor, "*lead tokens dim"], values: Float[Tensor, "*lead tokens dim_value"]) -> None:
        """Take the next tokens, then cluster every segment that is due."""
        self.extend(keys, values)
        self.cluster()

    def extend(self, keys: Tensor, values: Tensor) -> None:
        """The first half of `append`: take the next tokens, exact as yet."""
        check_append(keys, values, None if self._held is None else self.stored)
        if self.settings.is_centred:
            check_half_range("keys", keys, "with is_centred")
        if keys.shape[-2] == 0 and self._held is not None:
            return
        n_seen = self.n_seen + keys.shape[-2]
        if self._held is None:
            self.body.backend = self._step_backend(keys, values)
            self.body.n_heads = 1 if keys.ndim == 2 else keys.shape[-3]
        if self._held is None or n_seen > self._held[0].shape[-2]:
            self._move_to_room_for(n_seen, (keys, values))
        for held, new in zip(self._held, (keys, values), strict=True):
            held[..., self.n_seen : n_seen, :] = new.detach()
        self._is_prompt = self.n_seen == 0
        self._before = self.n_clustered, self.body.n_clusters
        self.n_seen = n_seen

    def _step_backend(self, keys: Tensor, values: Tensor) -> str:
        """What selects and attends for such keys and values."""
        return choose("attend_recalled", self.backend, keys.detach(), values.detach())

    def cluster(self) -> None:
        """The second half of `append`: cluster every segment that is due."""
        leaving = max(0, self.n_seen - self.settings.n_sink - self.n_clustered - self.settings.n_recent)
        sizes = self.settings.sizes(leaving, is_first=self._is_prompt)
        for size in dict.fromkeys(sizes):  # those of one size together
            segments = sizes.count(size)
            start = self.settings.n_sink + self.n_clustered
            parts = [self._flat(array)[:, start : start + segments * size] for array in self._held]
            in_segments = [part.unflatten(1, (segments, size)) for part in parts]
            places = self.body.add(in_segments[0], in_segments[1], n_clusters=self.settings.n_clusters(size))
            for part, held in zip(parts, self._held, strict=True):
                part.copy_(rows_of(self._flat(held), start + places))

    def crop(self, n_tokens: int) -> None:
        """Remove the last `n_tokens` tokens: the cache is then as if they had never come.

        Clusters that the last append made with them are made again without them, which costs what `cluster` did.

        Raises
        ------
        TypeError : not an integer.
        ValueError : less than 0 or more than `n_croppable`. The cache is then as it was.
        """
        check_integer("n_tokens", n_tokens, least=0)
        if n_tokens > self.n_croppable:
            raise ValueError(
                f"n_tokens must be at most n_croppable, {self.n_croppable} of {self.n_seen} tokens, "
                f"for clusters that are older than the last append stay whole, got {n_tokens}"
            )
        n_left = self.n_seen - int(n_tokens)
        is_clustered_anew = n_left < self.settings.fewest_seen(self.n_clustered)
        if is_clustered_anew:
            self._drop_clusters_of_last_append()
        self.n_seen = n_left
        if is_clustered_anew:
            self.cluster()
        if n_tokens > 0 and n_left == 0:
            self._held = None

    def select_clusters(self, query: Float[Tensor, "*lead group dim"]) -> Selection | None:
        """What `query` recalls with the budget that sinks and recent tokens leave; None while there is no body."""
        check_query(query, None if self._held is None else self.stored[0])
        taken = self._take(self._flat(query.detach()))
        return None if taken is None else Selection(self._with_leads(self.body.joined(taken)))

    def attend(
        self, query: Float[Tensor, "*lead group dim"], *, scale: float | None = None
    ) -> Float[Tensor, "*lead group dim_value"]:
        """Attention of a group's query heads (..., group, dim) to sinks, recalled and recent tokens."""
        check_query(query, None if self._held is None else self.stored[0])
        flat = self._flat(query.detach())
        output = self._step(self._take(flat)).attend(flat, query.shape[-1] ** -0.5 if scale is None else scale)
        return output.reshape(*query.shape[:-1], output.shape[-1])

    def entries(self, selection: Selection | None) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values and counts (..., entries, .) of what is attended to: sinks, recent tokens, what is recalled."""
        taken = None if selection is None else self.body.parted(selection.taken)
        keys, values, counts = map(self._with_leads, self._step(taken).entries())
        return keys, values, counts

    @on_ordinary_tensors
    def select(self, indices: Int64[Tensor, " batch"]) -> None:
        """Keep the rows `indices` of the first axis, in their order; a row may be taken more than once (beams)."""
        if self._held is None:
            return
        problems = torch.arange(self._held[0].shape[:-2].numel(), device=indices.device).reshape(self.n_rows, -1)
        self.body.select_rows(problems.index_select(0, indices).flatten())
        self._held = tuple(array.index_select(0, indices) for array in self._held)

    def state(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Tensors and integers from which `restore` makes the same cache; no tensors before the first `append`."""
        if self._held is None:
            return {}, {}
        tensors = dict(zip(("keys", "values"), self.stored, strict=True)) | self.body.state()
        numbers = {"n_seen": self.n_seen, "n_clustered": self.n_clustered, "is_prompt": self._is_prompt}
        return tensors, numbers | dict(zip(BEFORE, self._before, strict=True))

    def restore(self, tensors: dict[str, Tensor], numbers: dict[str, int]) -> None:
        """Take over copies of the `state` of a cache with the same parameters; this one must be empty.

        What could be cropped there can be cropped here. Numbers that an older version wrote do not say what the last
        append clustered: then all clusters stay whole.
        """
        if tensors:
            self.extend(tensors["keys"], tensors["values"])
            self._is_prompt = bool(numbers["is_prompt"])
            self.body.restore(tensors)
            now = self.n_clustered, self.body.n_clusters
            self._before = tuple(numbers.get(name, number) for name, number in zip(BEFORE, now, strict=True))

    def _drop_clusters_of_last_append(self) -> None:
        """Forget these clusters and put their tokens back into the order in which they came."""
        n_clustered, n_clusters = self._before
        start = self.settings.n_sink + n_clustered
        places = self.body.drop(n_clustered, n_clusters).to(self._held[0].device)
        for held in map(self._flat, self._held):
            held[:, start : start + places.shape[1]] = rows_of(held, start + places)

    def _take(self, query: Tensor) -> list[Tensor] | None:
        """Tokens taken of each cluster by each choice, see `BodyClusters.take`; None while there is no body."""
        return None if self.n_clustered == 0 else self.body.take(query, self.settings.budget_of_body(self._n_exact))

    def _step(self, taken: list[Tensor] | None) -> RecallStep:
        """A step that takes these tokens."""
        n_recalled = min(self.settings.budget_of_body(self._n_exact), self.n_clustered)
        return RecallStep(self.body, self._reached(taken), taken, n_recalled)

    @property
    def _n_exact(self) -> int:
        """Tokens that are always attended to: sinks and recent ones."""
        return self.n_seen - self.n_clustered

    def _reached(self, taken: list[Tensor] | None) -> Reached:
        """Where a step that takes these tokens finds them."""
        first_row = None if taken is None else self.body.first_member
        keys, values = map(self._flat, self._held)
        return Reached(keys, values, first_row, self.settings.n_sink, self.n_clustered, self._n_exact)

    def _in_order_of_arrival(self, array: Tensor) -> Tensor:
        """`array` (..., n_seen, dim) with its body in token order; itself while there is no body."""
        if self.n_clustered == 0:
            return array
        return self.body.in_order_of_arrival(self._flat(array), self.settings.n_sink).view(array.shape)

    def _flat(self, array: Tensor) -> Tensor:
        """`array` (..., rows, dim) with one leading axis."""
        return array.reshape(array.shape[:-2].numel(), *array.shape[-2:])

    def _with_leads(self, array: Tensor) -> Tensor:
        """`array` (problems, ...) with the leading axes of what was appended."""
        return array.reshape(*self._held[0].shape[:-2], *array.shape[1:])

    def _move_to_room_for(self, tokens: int, like: tuple[Tensor, ...]) -> None:
        """Move what is stored to memory with room for `tokens` and some more."""
        rows = with_room(tokens, least=self.settings.segment_size)
        self._held = move_to_room(self._held, self.n_seen, like, rows)
