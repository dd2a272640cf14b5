"""The clusters of a recall cache's body: they grow segment by segment, and a query takes tokens of them."""

import time
from collections.abc import Sequence

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from ..backends import cell
from ..exact.clusters import Clusters
from ..exact.entries import Rest
from ..exact.sampling import sample_tokens
from ..exact.scores import ScoredClusters, make_probe, score_clusters
from .segments import RecallSettings
from .work import ClusteringWork

__all__ = ["BodyClusters", "mean_deviations", "mean_of_members"]

LARGEST_BFLOAT16 = torch.finfo(torch.bfloat16).max


class BodyClusters:
    """Clusters of keys (problems, tokens, dim) that arrive in segments.

    Attributes
    ----------
    backend : that of decoding steps, as `choose` gives it.
    n_heads : size of the last of the axes that problems are made of; 1 without any.
    n_tokens : tokens clustered so far.
    counts, first_member : (problems, clusters), int64: as in `Clusters`.
    members : (problems, n_tokens), int64: the tokens, segment after segment, cluster after cluster.
    scored : centroids and deviations, in bfloat16; None while there is no segment.
    value_centroids : (problems, clusters, dim_value), float32; None unless `centroids_for_rest`.
    work : what clustering has cost.
    """

    def __init__(self, settings: RecallSettings) -> None:
        self.settings = settings
        self.backend, self.n_heads = "auto", 1  # until the first tokens decide it
        self.n_tokens = 0
        self.work = ClusteringWork()
        self.scored: ScoredClusters | None = None
        self.counts: Int64[Tensor, "problems clusters"] | None = None
        self.first_member: Int64[Tensor, "problems clusters"] | None = None
        self.members: Int64[Tensor, "problems tokens"] | None = None
        self.value_centroids: Float[Tensor, "problems clusters dim_value"] | None = None

    @property
    def n_clusters(self) -> int:
        return 0 if self.counts is None else self.counts.shape[1]

    @property
    def nbytes(self) -> int:
        arrays = [self.counts, self.first_member, self.members, self.value_centroids]
        if self.scored is not None:
            arrays += [self.scored.features, self.scored.mean, self.scored.largest]
        return sum(array.nbytes for array in arrays if array is not None)

    def add(
        self,
        keys: Float[Tensor, "problems segments size dim"],
        values: Float[Tensor, "problems segments size dim_value"],
        n_clusters: int,
    ) -> Int64[Tensor, "problems tokens"]:
        """Cluster segments of one size, each alone into `n_clusters`.

        Returns their tokens (problems, segments * size) in cluster order, counted from the first of them.
        """
        begun = time.perf_counter()
        problems, segments, size, dim = keys.shape
        flat = keys.reshape(problems * segments, size, dim)
        first = flat.gather(1, self._begin_at(keys, n_clusters).unsqueeze(-1).expand(-1, -1, dim))
        rules = {"max_iter": self.settings.max_iter, "is_centred": self.settings.is_centred}
        fitted = cell("kmeans", self.backend)(flat, first.float(), **rules)
        clusters = Clusters(fitted.labels, fitted.counts, fitted.centroids)
        features = torch.cat([fitted.centroids, mean_deviations(flat, clusters, self.backend)], dim=-1)
        features = features.clamp(-LARGEST_BFLOAT16, LARGEST_BFLOAT16).bfloat16()
        first_token = self.n_tokens + torch.arange(segments, device=keys.device) * size
        members = (clusters.members.unflatten(0, (problems, segments)) + first_token[:, None]).flatten(1)

        self.counts = longer(self.counts, fitted.counts.reshape(problems, segments * n_clusters))
        self.first_member = self.counts.cumsum(dim=-1) - self.counts
        self.members = longer(self.members, members)
        old_features = None if self.scored is None else self.scored.features
        self.scored = score_clusters(
            longer(old_features, features.reshape(problems, segments * n_clusters, 2 * dim)), self.counts
        )
        if self.settings.centroids_for_rest:
            means = mean_of_members(values.reshape(*flat.shape[:2], values.shape[-1]), clusters, self.backend)
            self.value_centroids = longer(
                self.value_centroids, means.reshape(problems, segments * n_clusters, means.shape[-1])
            )
        self.n_tokens += segments * size
        self.work.add(fitted.n_rows, fitted.n_scored_rows, time.perf_counter() - begun)
        return members - (self.n_tokens - segments * size)

    def _begin_at(self, keys: Tensor, n_clusters: int) -> Int64[Tensor, "problems_and_segments clusters"]:
        """Tokens of the segments `keys` (problems, segments, size, dim) that are the first centroids."""
        problems, segments, size, _ = keys.shape
        if self.settings.init_seed is None:
            evenly = torch.arange(n_clusters, device=keys.device) * size // n_clusters
            return evenly.expand(problems * segments, -1)
        heads = torch.arange(problems, device=keys.device) % max(1, self.n_heads)
        starts = self.n_tokens + torch.arange(segments, device=keys.device) * size
        drawn = sample_tokens(size, n_clusters, seed=self.settings.init_seed, heads=heads, starts=starts)
        return drawn.flatten(0, 1)

    def drop(self, n_tokens: int, n_clusters: int) -> Int64[Tensor, "problems dropped"]:
        """Forget all but the first `n_clusters` clusters, those of the first `n_tokens` tokens.

        Returns where the other tokens lie, which `add` has moved: in order of arrival, counted from the first of them.
        """
        places = self.members[:, n_tokens:].argsort(dim=1)
        kept = {name: array[:, : n_tokens if name == "members" else n_clusters] for name, array in self.state().items()}
        self.restore({name: array.clone() for name, array in kept.items()} if n_clusters else {})
        return places

    def take(self, query: Float[Tensor, "problems group dim"], budget: int) -> list[Tensor]:
        """Tokens taken of each cluster (problems, clusters), `budget` or all.

        One for the whole group, or with `is_per_query_head` one for each query: see `choosing_together`.
        """
        queries = self.choosing_together(query)
        if budget >= self.n_tokens:
            return [self.counts] * len(queries)
        probes = (make_probe(each, self.settings.spread) for each in queries)
        return [cell("take", self.backend)(probe, self.scored, self.counts, budget) for probe in probes]

    def choosing_together(self, query: Float[Tensor, "problems group dim"]) -> tuple[Tensor, ...]:
        """The queries in parts that share a selection."""
        return query.split(1, dim=1) if self.settings.is_per_query_head else (query,)

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        """What each choice gave, (problems, ...), as one: (problems, group, ...) if query heads choose."""
        return torch.stack(tuple(parts), dim=1) if self.settings.is_per_query_head else parts[0]

    def parted(self, taken: Int64[Tensor, "*lead clusters"]) -> list[Tensor]:
        """As `take` gives it, what was `joined`."""
        group = taken.shape[-2] if self.settings.is_per_query_head else 1
        return list(taken.reshape(len(self.counts), group, self.n_clusters).unbind(dim=1))

    def rest(self, taken: Int64[Tensor, "problems clusters"] | None) -> Rest | None:
        """The clusters as what stands for their tokens that are not taken; None if nothing does."""
        if taken is None or not self.settings.centroids_for_rest:
            return None
        return self.scored.centroids, self.value_centroids, (self.counts - taken).int()

    def in_order_of_arrival(self, array: Float[Tensor, "problems tokens dim"], n_sink: int) -> Tensor:
        """A copy of `array` in which the rows behind `n_sink`, here in the order of clusters, are in token order."""
        ordered = array.clone()
        rows = array[:, n_sink : n_sink + self.n_tokens]
        index = self.members.unsqueeze(-1).expand(rows.shape)
        ordered[:, n_sink : n_sink + self.n_tokens] = torch.empty_like(rows).scatter_(1, index, rows)
        return ordered

    def labels(self) -> Int64[Tensor, "problems tokens"]:
        """Cluster of each token, made from `members`."""
        problems, n_clusters = self.counts.shape
        clusters = torch.arange(n_clusters, device=self.counts.device).repeat(problems)
        sorted_labels = clusters.repeat_interleave(self.counts.flatten()).view_as(self.members)
        return torch.empty_like(self.members).scatter_(1, self.members, sorted_labels)

    def state(self) -> dict[str, Tensor]:
        """The tensors from which `restore` makes the same clusters; none while there is no segment."""
        if self.scored is None:
            return {}
        tensors = {"counts": self.counts, "members": self.members, "features": self.scored.features}
        return tensors | ({} if self.value_centroids is None else {"value_centroids": self.value_centroids})

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Hold the `state` that is among `tensors`, and nothing else."""
        names = ("counts", "members", "value_centroids")
        self.counts, self.members, self.value_centroids = map(tensors.get, names)
        self.n_tokens, self.first_member, self.scored = 0, None, None
        if "features" in tensors:
            self.n_tokens = self.members.shape[1]
            self.first_member = self.counts.cumsum(dim=-1) - self.counts
            self.scored = score_clusters(tensors["features"], self.counts)

    def select_rows(self, indices: Int64[Tensor, " rows"]) -> None:
        """Keep the problems `indices`, in their order."""
        if self.scored is None:
            return
        self.counts, self.first_member, self.members = (
            array.index_select(0, indices) for array in (self.counts, self.first_member, self.members)
        )
        scored = (self.scored.features, self.scored.mean, self.scored.largest)
        self.scored = ScoredClusters(*(array.index_select(0, indices) for array in scored))
        if self.value_centroids is not None:
            self.value_centroids = self.value_centroids.index_select(0, indices)


def longer(held: Tensor | None, new: Tensor) -> Tensor:
    """`held`, if there is any, with `new` behind it."""
    return new if held is None else torch.cat([held, new], dim=1)


def mean_of_members(values: Tensor, clusters: Clusters, backend: str) -> Float32[Tensor, "problems clusters dim_value"]:
    """Value centroids, by the rules for keys; 0 for an empty cluster."""
    nothing = values.new_zeros(*clusters.counts.shape, values.shape[-1], dtype=torch.float32)
    return cell("cluster_means", backend)(values, clusters.labels, nothing)[1]


def mean_deviations(keys: Tensor, clusters: Clusters, backend: str) -> Float32[Tensor, "problems clusters dim"]:
    """Mean of |key - centroid| of each cluster, feature by feature, by the rules for centroids; 0 for an empty one."""
    nothing = torch.zeros_like(clusters.centroids)
    return cell("cluster_means", backend)(keys, clusters.labels, nothing, clusters.centroids)[1]
