"""How near clusters lie to the queries of a group: in float32 with an error bound, and canonically where that is open.

The scores are defined by `kvcluster.reference.cluster_scores`. Centroid and deviations of a cluster lie side by side as
its features, so that one matrix product with (query, reach) scores them.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32, Float64, Int64
from torch import Tensor

from .mean import cluster_means
from .similarity import MAX_DIM, SAFE_NORM, halving_sum, matmul_unit

__all__ = ["ScoredClusters", "approximate_scores", "canonical_scores", "make_probe", "score_clusters", "spend"]


@dataclass(frozen=True, eq=False)
class ScoredClusters:
    """What is read of clusters to score them.

    Attributes
    ----------
    features : (problems, clusters, 2 * dim), bfloat16 or float32: centroids, then deviations.
    mean : (problems, 1, 2 * dim): those of the mean cluster.
    largest : (problems, 2): lengths of the longest centroid and of the longest deviation.
    """

    features: Float[Tensor, "problems clusters two_dims"]
    mean: Float32[Tensor, "problems 1 two_dims"]
    largest: Float32[Tensor, "problems 2"]

    @property
    def centroids(self) -> Float32[Tensor, "problems clusters dim"]:
        return self.features.chunk(2, dim=-1)[0].float()

    @property
    def deviations(self) -> Float32[Tensor, "problems clusters dim"]:
        return self.features.chunk(2, dim=-1)[1].float()


def score_clusters(features: Float[Tensor, "problems clusters two_dims"], counts: Tensor) -> ScoredClusters:
    """`features` with their mean over the clusters that are not empty, and with the lengths."""
    nothing = torch.zeros_like(features[:, :1], dtype=torch.float32).expand(-1, 2, -1)
    mean = cluster_means(features, (counts == 0).long(), nothing)[1][:, :1].contiguous()
    halves = features.float().unflatten(-1, (2, -1))  # (problems, clusters, 2, dim)
    return ScoredClusters(features, mean, torch.linalg.vector_norm(halves, dim=-1).amax(dim=1))


def make_probe(query: Tensor, spread: float) -> Float32[Tensor, "problems group two_dims"]:
    """The queries (problems, group, dim), then how far each reaches for deviations: `spread * |q|`."""
    reach = (float(spread) * query.double().abs()).float()
    return torch.cat([query.float(), reach], dim=-1)


def approximate_scores(probe: Tensor, clusters: ScoredClusters) -> tuple[Tensor, Tensor]:
    """Scores (problems, clusters) in float32, and the lead (problems, 1) above which their order is certain.

    theory/exactness, E9. The mean cluster's score is made in float64: its error, different for each query of the
    group, would count as much as a cluster's.
    """
    with torch.autocast(probe.device.type, enabled=False):
        mean_scores = (probe.double() * clusters.mean.double()).sum(dim=-1, keepdim=True).float()
        scores = probe @ clusters.features.float().mT - mean_scores  # (problems, group, clusters)
    lengths = torch.linalg.vector_norm(probe.unflatten(-1, (2, -1)), dim=-1)  # (problems, group, 2)
    reached = (lengths * clusters.largest.unsqueeze(1)).sum(dim=-1).amax(dim=-1, keepdim=True)
    unit = matmul_unit(probe.device)
    sizes = torch.stack([lengths[..., 0].amax(dim=-1), clusters.largest[:, 0]], dim=-1)  # (problems, 2)
    is_safe = (sizes > SAFE_NORM[0]) & (sizes < SAFE_NORM[1]) & (clusters.largest < SAFE_NORM[1])
    is_safe = is_safe.all(dim=-1, keepdim=True) & (probe.shape[-1] <= MAX_DIM)
    lead = torch.where(is_safe, (2 * probe.shape[-1] + 64) * unit * reached, torch.inf)
    return torch.where(is_safe, scores.amax(dim=1), 0.0), lead


def canonical_scores(
    probe: Tensor, clusters: ScoredClusters, chosen: Int64[Tensor, "problems chosen"]
) -> Float64[Tensor, "problems chosen"]:
    """Scores of the clusters `chosen`, with the bits of the reference."""

    def dots(features: Tensor) -> Tensor:
        """(problems, group, rows)"""
        products = probe.double().unsqueeze(-2) * features.double().unsqueeze(-3)
        centroid, deviation = products.chunk(2, dim=-1)
        return halving_sum(centroid + deviation)

    rows = clusters.features.gather(1, chosen.unsqueeze(-1).expand(-1, -1, probe.shape[-1]))
    return (dots(rows) - dots(clusters.mean)).amax(dim=1)


def spend(
    ranking: Int64[Tensor, "problems ranked"], counts: Int64[Tensor, "problems clusters"], budget: int
) -> Int64[Tensor, "problems clusters"]:
    """Tokens taken of each cluster: whole clusters in the order of `ranking`, which reaches as far as `budget` does."""
    ranked = counts.gather(1, ranking)
    before = ranked.cumsum(dim=-1) - ranked
    taken = (budget - before).clamp(min=0).minimum(ranked)
    return torch.zeros_like(counts).scatter_(1, ranking, taken)
