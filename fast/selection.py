"""Which clusters a query recalls, and how much of the last one: the reference's choice, certified."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor

from .arguments import check_scored
from .backends import Backend, implementation
from .exact.clusters import Clusters
from .exact.entries import recalled_places
from .exact.scores import make_probe, score_clusters
from .scalars import check_integer, check_share

__all__ = ["Selection", "select_clusters"]


@dataclass(frozen=True, eq=False)
class Selection:
    """How much of each cluster is recalled: as in `kvcluster.reference.selection`."""

    taken: Int64[Tensor, "*lead clusters"]

    def tokens(self, clusters: Clusters) -> Int64[Tensor, "*lead recalled"]:
        """Indices of the recalled tokens, cluster after cluster, ascending inside each; shorter lists end with -1."""
        lead, arrays = self.taken.shape[:-1], [clusters.members, clusters.first_member]
        if self.taken.ndim > clusters.labels.ndim:  # query heads that took of the same clusters
            arrays = [x.unsqueeze(-2).expand(*lead, -1) for x in arrays]
        members, first_member, taken = (x.reshape(lead.numel(), x.shape[-1]) for x in (*arrays, self.taken))
        places = recalled_places(first_member, taken)
        tokens = members.gather(1, places.clamp(min=0)) if members.shape[1] else places
        return torch.where(places < 0, -1, tokens).reshape(*lead, places.shape[1])


def select_clusters(
    query: Float[Tensor, "*lead group dim"],
    centroids: Float[Tensor, "*lead clusters dim"],
    counts: Int[Tensor, "*lead clusters"],
    *,
    budget: int,
    deviations: Float[Tensor, "*lead clusters dim"] | None = None,
    spread: float = 0.5,
    backend: Backend = "auto",
) -> Selection:
    """A token budget, spent on the clusters that score highest for a query.

    Defined, with its errors, by `kvcluster.reference.select_clusters`; the same tokens. `backend` as in `choose`.
    """
    check_scored(query, centroids, counts, centroids if deviations is None else deviations)
    if deviations is None:
        deviations = torch.zeros_like(centroids)
    budget = check_integer("budget", budget, least=0)
    spread = check_share("spread", spread)
    problems, dims = centroids.shape[:-2].numel(), (centroids.shape[-2], centroids.shape[-1])
    features = torch.cat([x.detach().float().reshape(problems, *dims) for x in (centroids, deviations)], dim=-1)
    counts = counts.long()
    flat_counts = counts.reshape(problems, dims[0])
    take = implementation("select_clusters", backend, query, centroids)
    probe = make_probe(query.detach().reshape(problems, *query.shape[-2:]), spread)
    taken = take(probe, score_clusters(features, flat_counts), flat_counts, budget)
    return Selection(taken.reshape(counts.shape))
