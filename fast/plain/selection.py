"""The clusters that a query recalls: ranked by approximate scores, by canonical ones where these leave it open."""

import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from ..exact.scores import ScoredClusters, approximate_scores, canonical_scores, spend

__all__ = ["take"]


def take(
    probe: Float32[Tensor, "problems group two_dims"],
    clusters: ScoredClusters,
    counts: Int64[Tensor, "problems clusters"],
    budget: int,
) -> Int64[Tensor, "problems clusters"]:
    """Tokens taken of each cluster, whole clusters by descending score."""
    return spend(certified_ranking(probe, clusters, counts, budget), counts, budget)


def certified_ranking(
    probe: Tensor, clusters: ScoredClusters, counts: Tensor, budget: int
) -> Int64[Tensor, "problems ranked"]:
    """Clusters by descending score, at least as many as the budget reaches."""
    scores, lead = approximate_scores(probe, clusters)
    n_clusters, tokens = counts.shape[1], int(counts.sum()) // max(1, len(counts))
    # about twice as many as the budget needs if clusters are of equal size
    n_ranked = min(n_clusters, 2 * budget * n_clusters // max(1, tokens) + 32)
    while True:
        ranking, is_open, is_enough = filtered_ranking(scores, counts, lead, budget, n_ranked)
        if is_enough:
            break
        n_ranked = n_clusters
    return settle(ranking, is_open, probe, clusters) if bool((is_open.sum(dim=-1) > 1).any()) else ranking


def filtered_ranking(
    scores: Tensor, counts: Tensor, lead: Tensor, budget: int, n_ranked: int
) -> tuple[Tensor, Tensor, bool]:
    """The `n_ranked` highest scores' clusters in order; which are open; whether these are all that matter.

    Let t be the score of the cluster in which the budget ends, in this order. Whatever the true order: a cluster that
    scores more than `lead` above t is taken whole, for it and all before it are among those scoring more than t. One
    that scores more than `lead` below t gets nothing, for all that end the budget are before it. The others are open,
    and their order among themselves decides how much each gets.
    """
    top = scores.topk(n_ranked, dim=-1)
    reached = counts.gather(1, top.indices).cumsum(dim=-1)
    boundary = (reached < budget).sum(dim=-1, keepdim=True)  # n_ranked where the budget does not end
    ends = boundary < n_ranked
    t = top.values.gather(1, boundary.clamp(max=n_ranked - 1))
    is_open = (top.values >= t - lead) & (top.values <= t + lead) & ends
    is_enough = n_ranked == scores.shape[1] or not bool((is_open[:, -1:] | ~ends).any())
    return top.indices, is_open, is_enough


def settle(ranking: Tensor, is_open: Tensor, probe: Tensor, clusters: ScoredClusters) -> Tensor:
    """`ranking` with the open clusters, which lie side by side in it, in their canonical order."""
    n_open = is_open.sum(dim=-1, keepdim=True)
    run = torch.arange(int(n_open.max()), device=ranking.device)
    is_run = run < n_open
    place = is_open.int().argmax(dim=-1, keepdim=True) + run  # argmax: the first
    n_clusters = clusters.features.shape[1]
    opened = ranking.gather(1, place.clamp(max=ranking.shape[1] - 1)).masked_fill(~is_run, n_clusters)
    opened = opened.sort(dim=-1).values  # of ties, the first is to come first
    exact = canonical_scores(probe, clusters, opened.clamp(max=n_clusters - 1))
    exact = exact.masked_fill(opened == n_clusters, -torch.inf)
    opened = opened.gather(1, exact.argsort(dim=-1, descending=True, stable=True))
    problem, column = is_run.nonzero(as_tuple=True)
    settled = ranking.clone()
    settled[problem, place[problem, column]] = opened[problem, column]
    return settled
