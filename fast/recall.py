"""Recall on torch tensors: attend to the tokens of the clusters that lie nearest to the query."""

from typing import Any

from jaxtyping import Float
from torch import Tensor

from .arguments import check_attention, check_integers
from .backends import Backend, choose, implementation
from .exact.clusters import Clusters
from .memory.body_clusters import mean_deviations, mean_of_members
from .scalars import check_integer, scale_of
from .selection import select_clusters

__all__ = ["recall_attention"]


def recall_attention(
    query: Float[Tensor, "*lead group dim"],
    keys: Float[Tensor, "*lead tokens dim"],
    values: Float[Tensor, "*lead tokens dim_value"],
    clusters: Clusters,
    *,
    budget: int,
    scale: float | None = None,
    centroids_for_rest: bool = False,
    spread: float = 0.5,
    backend: Backend = "auto",
) -> Float[Tensor, "*lead group dim_value"]:
    """Attention of a group of query heads to the tokens that `select_clusters` takes for them, in the dtype of `query`.

    Defined, with its errors, by `kvcluster.reference.recall_attention`; the same tokens, attention in float32.
    `backend` as in `choose`.
    """
    check_attention(query, keys, values)
    budget = check_integer("budget", budget, least=1)
    check_integers("labels of clusters", clusters.labels, keys)
    if clusters.labels.shape != keys.shape[:-1]:
        raise ValueError(
            "clusters must have a label for every token of keys, "
            f"got {tuple(clusters.labels.shape)} and {tuple(keys.shape)}"
        )
    flat = Clusters(*(with_one_lead(x, keys) for x in (clusters.labels, clusters.counts, clusters.centroids)))
    flat_keys, flat_values, flat_query = (with_one_lead(x.detach(), keys) for x in (keys, values, query))
    chosen: Any = choose("select_clusters", backend, query, keys, values)
    selection = select_clusters(
        flat_query,
        flat.centroids,
        flat.counts,
        budget=budget,
        deviations=mean_deviations(flat_keys, flat, chosen),
        spread=spread,
        backend=chosen,
    )
    tokens = selection.tokens(flat)  # (problems, recalled)
    rest = None
    if centroids_for_rest:
        rest = flat.centroids, mean_of_members(flat_values, flat, chosen), (flat.counts - selection.taken).int()
    attend = implementation("attend_places", backend, flat_query, flat_keys, flat_values)
    output = attend(flat_query, flat_keys, flat_values, tokens, rest, scale_of(scale, query))
    return output.reshape(*query.shape[:-1], values.shape[-1])


def with_one_lead(array: Tensor, keys: Tensor) -> Tensor:
    """`array` with one leading axis instead of all those of `keys` (..., tokens, dim)."""
    return array.reshape(keys.shape[:-2].numel(), *array.shape[keys.ndim - 2 :])
