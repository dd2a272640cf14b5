"""Selection: which clusters a query recalls, and how much of the last one (ClusterKV, arXiv:2412.03213)."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int, Int64

from .arguments import check_integer, check_scored, check_share
from .cluster_scores import cluster_scores
from .kmeans import Clusters

__all__ = ["Selection", "select_clusters"]


@dataclass(frozen=True, eq=False)
class Selection:
    """How much of each cluster is recalled (docs/papers.md, ClusterKV: spending it).

    Attributes
    ----------
    taken : (..., clusters), int64: tokens taken of each cluster, the first in token order; between 0 and its count.
    """

    taken: Int64[np.ndarray, "*lead clusters"]

    def tokens(self, clusters: Clusters) -> Int64[np.ndarray, "*lead recalled"]:
        """Indices of the recalled tokens, cluster after cluster, ascending inside each.

        Where leading indices recall different numbers of tokens, the shorter lists end with -1. `taken` may have one
        leading axis more than the clusters: query heads that each took their own tokens of the same clusters.
        """
        lead, n_recalled = self.taken.shape[:-1], self.taken.sum(axis=-1)
        members, first_member = clusters.members, clusters.first_member
        if self.taken.ndim > members.ndim:
            members, first_member = (np.repeat(x[..., None, :], lead[-1], axis=-2) for x in (members, first_member))
        tokens = np.full((*lead, n_recalled.max() if n_recalled.size else 1), -1)  # of no rows, a list is not empty
        for problem in np.ndindex(*lead):
            spans = zip(first_member[problem], self.taken[problem], strict=True)
            recalled = [members[problem][first : first + n_taken] for first, n_taken in spans]
            tokens[problem][: n_recalled[problem]] = np.concatenate(recalled)
        return tokens


def select_clusters(
    query: Float[np.ndarray, "*lead group dim"],
    centroids: Float[np.ndarray, "*lead clusters dim"],
    counts: Int[np.ndarray, "*lead clusters"],
    *,
    budget: int,
    deviations: Float[np.ndarray, "*lead clusters dim"] | None = None,
    spread: float = 0.5,
) -> Selection:
    """A token budget, spent on the clusters that score highest for a query.

    Parameters
    ----------
    query : (..., group, dim), float16, bfloat16 or float32: the query heads that share one KV head, and one selection.
    centroids : (..., clusters, dim), clusters >= 1.
    counts : (..., clusters): tokens of each cluster; 0 where it is empty.
    budget : tokens to take, at least 0. Where there are fewer, all are taken.
    deviations : (..., clusters, dim), how far a cluster's keys lie from its centroid, see `mean_deviations`.
    spread : how much of the deviations is added to the scores, from 0 to 1.

    Returns
    -------
    Selection : whole clusters by descending score, ties to the smallest index; the last one is trimmed to its
        first tokens, so that exactly `budget` tokens are taken, or all.

    Raises
    ------
    ValueError : parameters out of range; arrays of a wrong dtype or shapes that do not fit.

    Notes
    -----
    Scores are those of `cluster_scores`, the same on every machine.

    From the paper: whole clusters until the budget, the last one trimmed. Our choices: one selection for the whole
    group, ties, which tokens a trim keeps. Source: docs/papers.md, ClusterKV: spending it.

    Examples
    --------
    The second cluster is nearest, then the third; the budget ends inside it:

    >>> query = np.array([[1, 0]], dtype=np.float32)
    >>> centroids = np.array([[-1, 5], [3, 0], [1, 1]], dtype=np.float32)
    >>> select_clusters(query, centroids, np.array([4, 4, 4]), budget=6)
    Selection(taken=array([0, 4, 2]))
    """
    check_scored(query, centroids, counts, centroids if deviations is None else deviations)
    if deviations is None:
        deviations = np.zeros_like(centroids)
    budget = check_integer("budget", budget, least=0)
    spread = check_share("spread", spread)
    ranking = np.argsort(-cluster_scores(query, centroids, counts, deviations, spread), axis=-1, kind="stable")
    counts_ranked = np.take_along_axis(counts.astype(np.int64), ranking, axis=-1)
    before = counts_ranked.cumsum(axis=-1) - counts_ranked
    taken_ranked = np.clip(budget - before, 0, counts_ranked)
    taken = np.empty_like(taken_ranked)
    np.put_along_axis(taken, ranking, taken_ranked, axis=-1)
    return Selection(taken)
