"""The recall cache on torch tensors: all tokens are kept and clustered as they arrive, few are attended to."""

from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from .arguments import check_append, check_array, check_half_range, check_integer, dtype_name
from .backends import AttentionBackend, choose_backend, has_cpp, refused_by_cpp
from .body_clusters import BodyClusters, StepBackend
from .cpu import LANES, library
from .cpu import recall as cpp
from .entry_attention import Rest, attend_places, entries_at, rows_of
from .kmeans import Clusters
from .ordinary import on_ordinary_tensors
from .segments import SegmentPlan
from .selection import Selection, recalled_places
from .work import ClusteringWork

__all__ = ["RecallCache"]


class Reached(NamedTuple):
    """Memory in which a step finds its tokens: sinks, then `n_body` rows, then recent tokens; clusters anywhere.

    Attributes
    ----------
    keys, values : (problems, rows, .).
    first_row : (problems, clusters), int64: where each cluster begins, counted from behind the sinks; None while there
        is no body.
    """

    keys: Tensor
    values: Tensor
    first_row: Tensor | None
    n_sink: int
    n_body: int


class RecallCache:
    """A key-value cache that forgets nothing and attends to at most `budget` tokens per KV head.

    Defined, with parameters, attributes and errors, by `kvcluster.reference.RecallCache`: the same clusters and the
    same recalled tokens, on the device of what is appended. `backend` is the one of steps, as in `choose_step_backend`.

    Notes
    -----
    The tokens of a cluster lie side by side in memory, so that recalling it reads one span. There is room to grow (1 /
    32 of the tokens, at least one segment): `nbytes` counts what is there, `nbytes_reserved` the memory. Appending a
    token moves no other one but where the room ends, clustering a segment moves its own. `stored` are views that the
    next `append` may overwrite, and what dense attention needs, to which order is nothing; `keys` and `values`
    are copies, once there is a body.

    A step reads the clusters' centroids and deviations, in bfloat16, and `budget` keys and values. No gradient flows
    through it.
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
        mass: float | None = None,
        centroids_for_rest: bool = False,
        backend: AttentionBackend = "auto",
    ) -> None:
        self.plan = SegmentPlan(budget, n_sink, n_recent, tokens_per_cluster, segment_size, prompt_segment_size)
        self.body = self.body_class(
            max_iter=max_iter,
            is_centred=is_centred,
            spread=spread,
            mass=mass,
            centroids_for_rest=centroids_for_rest,
            backend="torch",
        )
        self.backend = backend
        self.n_seen = 0
        self._is_prompt = True  # whether the last append was the first
        self._before = 0, 0  # tokens and clusters of the body before the last append
        self._held: tuple[Tensor, Tensor] | None = None  # keys and values (..., room, dim)

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

    @property
    def clusters(self) -> Clusters | None:
        if self.body.scored is None:
            return None
        centroids = self.body.scored.features.chunk(2, dim=-1)[0].float()
        return Clusters(*map(self._with_leads, (self.body.labels(), self.body.counts, centroids)))

    @property
    def deviations(self) -> Float32[Tensor, "*lead clusters dim"] | None:
        return (
            None
            if self.body.scored is None
            else self._with_leads(self.body.scored.features.chunk(2, dim=-1)[1].float())
        )

    @property
    def n_stored(self) -> int:
        return self.n_seen

    @property
    def work(self) -> ClusteringWork:
        """What clustering has cost."""
        return self.body.work

    @property
    def n_clustered(self) -> int:
        return self.body.n_tokens

    @property
    def n_croppable(self) -> int:
        """The most tokens that `crop` takes out: clusters that are older than the last append stay whole."""
        return self.n_seen - self.plan.fewest_seen(self._before[0])

    @property
    def nbytes(self) -> int:
        return self.body.nbytes + (0 if self._held is None else sum(view.nbytes for view in self.stored))

    @property
    def nbytes_reserved(self) -> int:
        """Bytes of memory held, room to grow included."""
        held = () if self._held is None else self._held
        return self.body.nbytes + sum(tensor.untyped_storage().nbytes() for tensor in held)

    def append(self, keys: Float[Tensor, "*lead tokens dim"], values: Float[Tensor, "*lead tokens dim_value"]) -> None:
        """Take the next tokens, then cluster every segment that is due."""
        self.extend(keys, values)
        self.cluster()

    def extend(self, keys: Tensor, values: Tensor) -> None:
        """The first half of `append`: take the next tokens, exact as yet."""
        check_append(keys, values, None if self._held is None else self.stored)
        if self.body.is_centred:
            check_half_range(keys)
        if keys.shape[-2] == 0 and self._held is not None:
            return
        n_seen = self.n_seen + keys.shape[-2]
        if self._held is None:
            self.body.backend = choose_step_backend(self.backend, keys, values)
        if self._held is None or n_seen > self._held[0].shape[-2]:
            self._move_to_room_for(n_seen, (keys, values))
        for held, new in zip(self._held, (keys, values), strict=True):
            held[..., self.n_seen : n_seen, :] = new.detach()
        self._is_prompt = self.n_seen == 0
        self._before = self.n_clustered, self.body.n_clusters
        self.n_seen = n_seen

    def cluster(self) -> None:
        """The second half of `append`: cluster every segment that is due."""
        leaving = max(0, self.n_seen - self.plan.n_sink - self.n_clustered - self.plan.n_recent)
        sizes = self.plan.sizes(leaving, is_first=self._is_prompt)
        for size in dict.fromkeys(sizes):  # those of one size together
            segments = sizes.count(size)
            start = self.plan.n_sink + self.n_clustered
            parts = [self._flat(array)[:, start : start + segments * size] for array in self._held]
            in_segments = [part.unflatten(1, (segments, size)) for part in parts]
            places = self.body.add(in_segments[0], in_segments[1], n_clusters=self.plan.n_clusters(size))
            for part, held in zip(parts, self._held, strict=True):
                part.copy_(rows_of(self._flat(held), start + places))

    def crop(self, n_tokens: int) -> None:
        """Take the last `n_tokens` tokens out: what is left is the cache of the others, as if these had never come.

        Clusters that the last append made of them are made again, of what is left: that costs what `cluster` did.

        Raises
        ------
        TypeError : no integer.
        ValueError : less than 0 or more than `n_croppable`. The cache is then as it was.
        """
        check_integer("n_tokens", n_tokens, least=0)
        if n_tokens > self.n_croppable:
            raise ValueError(
                f"n_tokens must be at most n_croppable, {self.n_croppable} of {self.n_seen} tokens, "
                f"for clusters that are older than the last append stay whole, got {n_tokens}"
            )
        n_left = self.n_seen - int(n_tokens)
        is_clustered_anew = n_left < self.plan.fewest_seen(self.n_clustered)
        if is_clustered_anew:
            self._drop_clusters_of_last_append()
        self.n_seen = n_left
        if is_clustered_anew:
            self.cluster()
        if n_tokens > 0 and n_left == 0:
            self._held = None

    def select_clusters(
        self, query: Float[Tensor, "*lead group dim"], *, scale: float | None = None
    ) -> Selection | None:
        """What `query` recalls with the budget that sinks and recent tokens leave; None while there is no body."""
        self._check_query(query)
        return None if self.n_clustered == 0 else Selection(self._with_leads(self._take(query, scale)))

    def attend(
        self, query: Float[Tensor, "*lead group dim"], *, scale: float | None = None
    ) -> Float[Tensor, "*lead group dim_value"]:
        """Attention of a group's query heads (..., group, dim) to sinks, recalled and recent tokens."""
        self._check_query(query)
        taken = None if self.n_clustered == 0 else self._take(query, scale)
        reached = self._reached(taken)
        is_plain = self.body.mass is None and not self.body.centroids_for_rest
        if taken is not None and is_plain and self.body.backend == "cpp":
            output = cpp.attend_body(
                self._flat(query.detach()),
                reached.keys,
                reached.values,
                reached.first_row,
                taken,
                n_sink=reached.n_sink,
                n_exact=self.n_seen - self.n_clustered,
                n_body=reached.n_body,
                scale=query.shape[-1] ** -0.5 if scale is None else scale,
            )
            return output.reshape(query.shape)
        output = attend_places(
            self._flat(query.detach()),
            reached.keys,
            reached.values,
            self._places(taken, reached),
            self._rest(taken),
            scale=scale,
            backend=self.body.backend,
        )
        return output.reshape(*query.shape[:-1], output.shape[-1])

    def entries(self, selection: Selection | None) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values and counts (..., entries, .) of what is attended to: sinks, recent tokens, what is recalled."""
        taken = None if selection is None else selection.taken.reshape(-1, self.body.n_clusters)
        reached = self._reached(taken)
        entries = entries_at(reached.keys, reached.values, self._places(taken, reached), self._rest(taken))
        keys, values, counts = map(self._with_leads, entries)
        return keys, values, counts

    @on_ordinary_tensors
    def select(self, indices: Int64[Tensor, " batch"]) -> None:
        """Keep the rows `indices` of the first axis, in their order; a row may be taken more than once (beams)."""
        if self._held is None:
            return
        batch = self._held[0].shape[0]
        problems = torch.arange(self._held[0].shape[:-2].numel(), device=indices.device).reshape(batch, -1)
        self.body.select_rows(problems.index_select(0, indices).flatten())
        self._held = self._held[0].index_select(0, indices), self._held[1].index_select(0, indices)

    def state(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Tensors and integers that `restore` makes the same cache of; no tensors before the first `append`."""
        if self._held is None:
            return {}, {}
        tensors = dict(zip(("keys", "values"), self.stored, strict=True)) | self.body.state()
        before = dict(zip(("n_clustered_before", "n_clusters_before"), self._before, strict=True))
        numbers = {"n_seen": self.n_seen, "n_clustered": self.n_clustered, "is_prompt": self._is_prompt}
        return tensors, numbers | before

    def restore(self, tensors: dict[str, Tensor], numbers: dict[str, int]) -> None:
        """Hold copies of what `state` gave of a cache with the same parameters; this one must be empty.

        What that could crop can be cropped here. Numbers that an older version wrote do not say what the last append
        clustered: all of that stays whole.
        """
        if tensors:
            self.extend(tensors["keys"], tensors["values"])
            self._is_prompt = bool(numbers["is_prompt"])
            self.body.restore(tensors)
            self._before = (
                numbers.get("n_clustered_before", self.n_clustered),
                numbers.get("n_clusters_before", self.body.n_clusters),
            )

    def _drop_clusters_of_last_append(self) -> None:
        """Forget these clusters and put their tokens back into the order in which they came."""
        n_clustered, n_clusters = self._before
        start = self.plan.n_sink + n_clustered
        places = self.body.drop(n_clustered, n_clusters).to(self._held[0].device)
        for held in map(self._flat, self._held):
            held[:, start : start + places.shape[1]] = rows_of(held, start + places)

    def _take(self, query: Tensor, scale: float | None) -> Int64[Tensor, "problems clusters"]:
        budget = self.plan.budget - (self.n_seen - self.n_clustered)
        return self.body.take(self._flat(query.detach()), budget, scale)

    def _reached(self, taken: Int64[Tensor, "problems clusters"] | None) -> "Reached":
        """Where a step that takes so much of each cluster finds its tokens."""
        first_row = None if taken is None else self.body.first_member
        keys, values = map(self._flat, self._held)
        return Reached(keys, values, first_row, self.plan.n_sink, self.n_clustered)

    def _places(
        self, taken: Int64[Tensor, "problems clusters"] | None, reached: "Reached"
    ) -> Int64[Tensor, "problems entries"]:
        """Rows of `reached` that are attended to: sinks, recent tokens, what is recalled; -1 where there are fewer."""
        n_exact = self.n_seen - self.n_clustered
        exact = torch.arange(n_exact, device=reached.keys.device)
        if taken is None:
            return exact.expand(len(reached.keys), -1)
        exact = torch.where(exact < reached.n_sink, exact, exact + reached.n_body)
        n_recalled = min(self.plan.budget - n_exact, self.n_clustered) if self.body.mass is None else None
        recalled = recalled_places(reached.n_sink + reached.first_row, taken, n_recalled)
        return torch.cat([exact.expand(len(taken), -1), recalled], dim=1)

    def _rest(self, taken: Int64[Tensor, "problems clusters"] | None) -> Rest | None:
        """The clusters, for the tokens of them that are not recalled; None if nothing stands for these."""
        if taken is None or not self.body.centroids_for_rest:
            return None
        centroids = self.body.scored.features.chunk(2, dim=-1)[0].float()
        return centroids, self.body.value_centroids, (self.body.counts - taken).int()

    def _in_order_of_arrival(self, array: Tensor) -> Tensor:
        """`array` (..., n_seen, dim) with its body in token order."""
        if self.n_clustered == 0:
            return array
        body = slice(self.plan.n_sink, self.plan.n_sink + self.n_clustered)
        ordered = array.clone()
        index = self._with_leads(self.body.members).unsqueeze(-1).expand(*array[..., body, :].shape)
        ordered[..., body, :] = torch.empty_like(array[..., body, :]).scatter_(-2, index, array[..., body, :])
        return ordered

    def _flat(self, array: Tensor) -> Tensor:
        """`array` (..., rows, dim) with one leading axis."""
        return array.reshape(array.shape[:-2].numel(), *array.shape[-2:])

    def _with_leads(self, array: Tensor) -> Tensor:
        """`array` (problems, ...) with the leading axes of what was appended."""
        return array.reshape(*self._held[0].shape[:-2], *array.shape[1:])

    @on_ordinary_tensors
    def _move_to_room_for(self, tokens: int, like: tuple[Tensor, Tensor]) -> None:
        """Move what is stored to memory with room for `tokens` and some more, one tensor after the other."""
        moved = []
        for place, example in enumerate(like):
            shape = (*example.shape[:-2], tokens + max(self.plan.segment_size, tokens // 32), example.shape[-1])
            room = torch.empty(shape, dtype=example.dtype, device=example.device)
            if self._held is not None:
                room[..., : self.n_seen, :] = self._held[place][..., : self.n_seen, :]
            moved.append(room)
        self._held = moved[0], moved[1]

    def _check_query(self, query: Tensor) -> None:
        if self._held is None:
            raise ValueError("attend needs at least one appended token, got an empty cache")
        check_array("query", query)
        keys = self.stored[0]
        if query.shape[:-2] != keys.shape[:-2] or query.shape[-1] != keys.shape[-1]:
            raise ValueError(
                "query must have the leading axes and dim of keys, "
                f"got query {tuple(query.shape)}, keys {tuple(keys.shape)}"
            )
        if query.shape[-2] == 0:
            raise ValueError(f"query must not be empty, got {tuple(query.shape)}")


def choose_step_backend(backend: AttentionBackend, keys: Tensor, values: Tensor) -> StepBackend:
    """What selects and attends for a cache of such keys and values: as `choose_attention_backend`.

    Raises
    ------
    ValueError : an unknown backend, or one that does not take these tensors.
    ModuleNotFoundError : triton, or a C++ compiler, where it is not installed.
    """
    is_taken = refused_by_cpp(keys, keys, values) is None
    if backend == "cpp":
        if not is_taken:
            raise ValueError(
                f"keys and values must be on the CPU, with one dtype and one dim, a multiple of {LANES}, for 'cpp', "
                f"got {dtype_name(keys)} {tuple(keys.shape)} and {dtype_name(values)} {tuple(values.shape)}"
            )
        library("recall")
        return "cpp"
    if backend == "auto" and is_taken and has_cpp():
        return "cpp"
    return choose_backend(backend, keys, values)
