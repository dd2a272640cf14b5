"""The recall cache on torch tensors: all tokens are kept and clustered as they arrive, few are attended to."""

from dataclasses import asdict

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from .arguments import check_query
from .backends import AnyBackend
from .exact.clusters import Clusters
from .exact.entries import Reached
from .memory.fast_tier import FastTier
from .memory.segments import RecallSettings
from .memory.step import RecallStep
from .memory.work import ClusteringWork
from .recall_tokens import RecallTokens
from .scalars import scale_of
from .selection import Selection

__all__ = ["RecallCache"]


class RecallCache(RecallTokens):
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

    With `bits` below 16 the body lies in memory in few bits, and a step reads back the clusters that the last one did
    not take tokens of: `nbytes_reserved` counts what it has read back.
    """

    n_steps = 1  # clusters stay read back for so many steps

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
        bits: int | tuple[int, int] = 16,
        backend: AnyBackend = "auto",
    ) -> None:
        sizes = budget, n_sink, n_recent, tokens_per_cluster, segment_size, prompt_segment_size
        clustering = max_iter, is_centred, spread, centroids_for_rest, init_seed
        self._begin(RecallSettings(*sizes, *clustering, is_per_query_head, is_exact_counted, bits), backend)

    @classmethod
    def as_published(cls, *, budget: int, seed: int = 0, backend: AnyBackend = "auto") -> "RecallCache":
        """An empty cache with the settings of the paper, see `kvcluster.reference.RecallCache.as_published`."""
        return cls(**asdict(RecallSettings.as_published(budget=budget, seed=seed)), backend=backend)

    @property
    def keys(self) -> Float[Tensor, "*lead tokens dim"] | None:
        return None if self._held is None else self._in_order_of_arrival(self.stored[0])

    @property
    def values(self) -> Float[Tensor, "*lead tokens dim_value"] | None:
        return None if self._held is None else self._in_order_of_arrival(self.stored[1])

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

    def append(self, keys: Float[Tensor, "*lead tokens dim"], values: Float[Tensor, "*lead tokens dim_value"]) -> None:
        """Take the next tokens, then cluster every segment that is due."""
        self.check_new(keys, values)
        self._append(keys, values)

    @property
    def _keys_like(self) -> Tensor | None:
        """A tensor of the shape of all keys; None at first."""
        like = self.like
        return None if like is None else like[0]

    def select_clusters(self, query: Float[Tensor, "*lead group dim"]) -> Selection | None:
        """What `query` recalls with the budget that sinks and recent tokens leave; None while there is no body."""
        check_query(query, self._keys_like)
        taken = self._take(self._flat(query.detach()))
        return None if taken is None else Selection(self._with_leads(self.body.joined(taken)))

    def attend(
        self, query: Float[Tensor, "*lead group dim"], *, scale: float | None = None
    ) -> Float[Tensor, "*lead group dim_value"]:
        """Attention of a group's query heads (..., group, dim) to sinks, recalled and recent tokens."""
        check_query(query, self._keys_like)
        flat = self._flat(query.detach())
        output = self._step(self._take(flat)).attend(flat, scale_of(scale, query))
        return output.reshape(*query.shape[:-1], output.shape[-1])

    def entries(self, selection: Selection | None) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values and counts (..., entries, .) of what is attended to: sinks, recent tokens, what is recalled."""
        taken = None if selection is None else self.body.parted(selection.taken)
        keys, values, counts = map(self._with_leads, self._step(taken).entries())
        return keys, values, counts

    def _in_order_of_arrival(self, array: Tensor) -> Tensor:
        """`array` (..., n_seen, dim) with its body in token order; itself while there is no body."""
        if self.n_clustered == 0:
            return array
        return self.body.in_order_of_arrival(self._flat(array), self.settings.n_sink).view(array.shape)

    def _take(self, query: Tensor) -> list[Tensor] | None:
        """Tokens taken of each cluster by each choice, see `BodyClusters.take`; None while there is no body."""
        return None if self.n_clustered == 0 else self.body.take(query, self.settings.budget_of_body(self._n_exact))

    def _step(self, taken: list[Tensor] | None) -> RecallStep:
        """A step that takes these tokens."""
        n_recalled = min(self.settings.budget_of_body(self._n_exact), self.n_clustered)
        return RecallStep(self.body, self._reached(taken), taken, n_recalled)

    def _reached(self, taken: list[Tensor] | None) -> Reached:
        """Where a step that takes these tokens finds them."""
        if self._packed is not None:
            return self._brought(taken)
        first_row = None if taken is None else self.body.first_member
        keys, values = map(self._flat, self._held)
        return Reached(keys, values, first_row, self.settings.n_sink, self.n_clustered, self._n_exact)

    @property
    def _near_device(self) -> torch.device:
        """Where attention takes place."""
        return self._held[0].device

    def _brought(self, taken: list[Tensor] | None) -> Reached:
        """The same in the fast tier, once all that this step attends to lies there."""
        near, self._near = self._near, None  # where this fails it is filled anew
        if near is None:
            near = FastTier(self._held, self._near_device, self.settings.budget, self._near_backend)
        slow = self._held, self._packed, self._n_exact, self.settings.n_sink
        near.step_to(taken, self.body, slow, self.n_steps, self.statistics)
        self._near = near
        # exact rows come first there, then clusters
        keys, values = near.held
        return Reached(keys, values, near.first_row, n_sink=0, n_body=0, n_exact=self._n_exact)
