"""Which clusters a query recalls, and how much of the last one: the reference's choice, certified."""

from dataclasses import dataclass
from numbers import Real

import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor

from .arguments import check_array, check_integer, dtype_name
from .backends import Backend, choose_backend
from .cluster_scores import ScoredClusters, approximate_scores, canonical_scores, make_probe, score_clusters
from .kmeans import Clusters

__all__ = ["Selection", "select_clusters"]


@dataclass(frozen=True, eq=False)
class Selection:
    """How much of each cluster is recalled: as in `kvcluster.reference.selection`."""

    taken: Int64[Tensor, "*lead clusters"]

    def tokens(self, clusters: Clusters) -> Int64[Tensor, "*lead recalled"]:
        """Indices of the recalled tokens, cluster after cluster, ascending inside each; shorter lists end with -1."""
        lead = self.taken.shape[:-1]
        members, first_member, taken = (
            x.reshape(lead.numel(), x.shape[-1]) for x in (clusters.members, clusters.first_member, self.taken)
        )
        places = recalled_places(first_member, taken)
        tokens = members.gather(1, places.clamp(min=0)) if members.shape[1] else places
        return torch.where(places < 0, -1, tokens).reshape(*lead, places.shape[1])


def recalled_places(
    first_member: Int64[Tensor, "problems clusters"],
    taken: Int64[Tensor, "problems clusters"],
    n_recalled: int | None = None,
) -> Int64[Tensor, "problems recalled"]:
    """Where recalled tokens are in `members`: `n_recalled` of each problem if that is known, else filled with -1."""
    device = taken.device
    shift = (first_member - (taken.cumsum(dim=-1) - taken)).flatten()  # from place in the list to place in `members`
    if n_recalled is not None:
        shift = shift.repeat_interleave(taken.flatten(), output_size=len(taken) * n_recalled)
        return shift.reshape(len(taken), n_recalled) + torch.arange(n_recalled, device=device)
    totals = taken.sum(dim=-1, keepdim=True)
    is_there = torch.arange(int(totals.max()) if len(totals) else 0, device=device) < totals
    places = torch.full(is_there.shape, -1, device=device)
    places[is_there] = shift.repeat_interleave(taken.flatten()) + is_there.nonzero(as_tuple=True)[1]
    return places


def select_clusters(
    query: Float[Tensor, "*lead group dim"],
    centroids: Float[Tensor, "*lead clusters dim"],
    counts: Int[Tensor, "*lead clusters"],
    *,
    budget: int,
    deviations: Float[Tensor, "*lead clusters dim"] | None = None,
    spread: float = 0.5,
    mass: float | None = None,
    scale: float | None = None,
    backend: Backend = "auto",
) -> Selection:
    """A token budget, spent on the clusters that score highest for a query.

    Defined, with its errors, by `kvcluster.reference.select_clusters`; the same tokens, but for `mass`. `backend` as in
    `choose_backend`.
    """
    if deviations is None:
        deviations = torch.zeros_like(centroids)
    check_scored(query, centroids, counts, deviations)
    check_integer("budget", budget, least=0)
    check_share("spread", spread, may_be_zero=True)
    if mass is not None:
        check_share("mass", mass, may_be_zero=False)
    problems, dims = centroids.shape[:-2].numel(), (centroids.shape[-2], centroids.shape[-1])
    features = torch.cat([x.detach().float().reshape(problems, *dims) for x in (centroids, deviations)], dim=-1)
    counts = counts.long()
    flat_counts = counts.reshape(problems, dims[0])
    taken = take(
        query.detach().reshape(problems, *query.shape[-2:]),
        score_clusters(features, flat_counts),
        flat_counts,
        budget=budget,
        spread=spread,
        mass=mass,
        scale=scale,
        backend=choose_backend(backend, query, centroids),
    )
    return Selection(taken.reshape(counts.shape))


def take(
    query: Float[Tensor, "problems group dim"],
    clusters: ScoredClusters,
    counts: Int64[Tensor, "problems clusters"],
    *,
    budget: int,
    spread: float,
    mass: float | None,
    scale: float | None,
    backend: str,
) -> Int64[Tensor, "problems clusters"]:
    """Tokens taken of each cluster, whole clusters by descending score."""
    probe = make_probe(query, spread)
    if backend == "triton":
        from .kernels.select import rank

        ranking = rank(probe, clusters.features, clusters.mean)
    else:
        ranking = certified_ranking(probe, clusters, counts, budget, is_whole=mass is not None)
    ranked = counts.gather(1, ranking)
    before = ranked.cumsum(dim=-1) - ranked
    taken = (budget - before).clamp(min=0).minimum(ranked)
    if mass is not None:
        shares = estimated_shares(query, clusters.features[..., : query.shape[-1]], counts, scale).gather(1, ranking)
        taken = torch.where(shares.cumsum(dim=-1) - shares < mass, taken, 0)
    return torch.zeros_like(counts).scatter_(1, ranking, taken)


def certified_ranking(
    probe: Tensor, clusters: ScoredClusters, counts: Tensor, budget: int, *, is_whole: bool
) -> Int64[Tensor, "problems ranked"]:
    """Clusters by descending score: all of them if `is_whole`, else at least as many as the budget reaches."""
    scores, lead = approximate_scores(probe, clusters)
    n_clusters = n_ranked = counts.shape[1]
    if not is_whole:  # try with about twice as many as the budget needs if clusters are of equal size
        tokens = int(counts.sum()) // max(1, len(counts))
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
    problem, one = is_run.nonzero(as_tuple=True)
    settled = ranking.clone()
    settled[problem, place[problem, one]] = opened[problem, one]
    return settled


def estimated_shares(query: Tensor, centroids: Tensor, counts: Tensor, scale: float | None) -> Tensor:
    """Share of each cluster in the group's attention if every token had its centroid as key, in float64."""
    if scale is None:
        scale = query.shape[-1] ** -0.5
    logits = scale * (query.double() @ centroids.double().mT) + counts.double().log().unsqueeze(-2)
    return logits.softmax(dim=-1).mean(dim=-2)


def check_share(name: str, share: float, *, may_be_zero: bool) -> None:
    """Refuse what is not a number from 0 to 1."""
    if isinstance(share, bool) or not isinstance(share, Real):
        raise TypeError(f"{name} must be a number, got {share!r}")
    if not (0 <= share <= 1 if may_be_zero else 0 < share <= 1):
        raise ValueError(f"{name} must be in {'[' if may_be_zero else '('}0, 1], got {share}")


def check_scored(query: Tensor, centroids: Tensor, counts: Tensor, deviations: Tensor) -> None:
    """Refuse tensors that do not fit each other."""
    for name, array in (("query", query), ("centroids", centroids), ("deviations", deviations)):
        check_array(name, array)
    shapes = tuple(query.shape), tuple(centroids.shape)
    if query.shape[:-2] != centroids.shape[:-2] or query.shape[-1] != centroids.shape[-1]:
        raise ValueError(f"query must have the leading axes and dim of centroids, got {shapes[0]} and {shapes[1]}")
    if query.shape[-2] == 0 or centroids.shape[-2] == 0:
        raise ValueError(f"query and centroids must not be empty, got {shapes[0]} and {shapes[1]}")
    if deviations.shape != centroids.shape:
        raise ValueError(f"deviations must have the shape of centroids, got {tuple(deviations.shape)} and {shapes[1]}")
    if counts.shape != centroids.shape[:-1]:
        raise ValueError(
            f"counts must have the shape of centroids without dim, got {tuple(counts.shape)} and {shapes[1]}"
        )
    if counts.is_floating_point() or counts.is_complex() or counts.dtype == torch.bool:
        raise ValueError(f"counts must be integers, got {dtype_name(counts)}")
    if bool((counts < 0).any()):
        raise ValueError(f"counts must be at least 0, got {int(counts.min())}")
