"""k-means over keys by cosine on torch tensors: the reference's labels, by a filter with a proof."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .arguments import check_array, check_init
from .backends import Backend, implementation
from .exact.clusters import Clusters
from .scalars import check_integer

__all__ = ["Clusters", "kmeans"]


def kmeans(
    keys: Float[Tensor, "*lead tokens dim"],
    *,
    n_clusters: int,
    init: Int[Tensor, "*lead n_clusters"] | Float[Tensor, "*lead n_clusters dim"] | None = None,
    max_iter: int = 10,
    is_centred: bool = False,
    backend: Backend = "auto",
) -> Clusters:
    """Clusters of keys that point in similar directions.

    Defined, with its errors, by `kvcluster.reference.kmeans`; the same bits, on the device of `keys`. `backend` as in
    `choose`.
    """
    check_array("keys", keys)
    n_clusters = check_integer("n_clusters", n_clusters, least=1)
    *lead, tokens, dim = keys.shape
    if n_clusters > tokens:
        raise ValueError(f"n_clusters must be at most the number of tokens, {tokens}, got {n_clusters}")
    max_iter = check_integer("max_iter", max_iter, least=1)
    if init is None:
        init = (torch.arange(n_clusters, device=keys.device) * tokens // n_clusters).expand(*lead, n_clusters)
    check_init(keys, init, n_clusters)
    fit = implementation("kmeans", backend, keys)
    problems = keys.shape[:-2].numel()
    flat = keys.detach().reshape(problems, tokens, dim)
    first = init.reshape(problems, *init.shape[len(lead) :])
    if not init.is_floating_point():
        first = flat.gather(1, first.long().unsqueeze(-1).expand(-1, -1, dim))
    fitted = fit(flat, first.float(), max_iter=max_iter, is_centred=is_centred)
    return Clusters(
        fitted.labels.reshape(*lead, tokens),
        fitted.counts.reshape(*lead, n_clusters),
        fitted.centroids.reshape(*lead, n_clusters, dim),
    )
