"""k-means over keys by cosine on torch tensors: the reference's labels, by a filter with a proof."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Float32, Int, Int64
from torch import Tensor

from .arguments import check_array, check_integer
from .assignment import assign
from .backends import Backend, choose_backend
from .exact_mean import ordered_mean
from .exact_similarity import normalized

__all__ = ["Clusters", "kmeans"]

# Keys are made float64 and added in parts of this size.
WORKING_BYTES = 2 * 2**20


@dataclass(frozen=True, eq=False)
class Clusters:
    """Which cluster each token belongs to, and where the clusters lie: as in `kvcluster.reference.kmeans`."""

    labels: Int64[Tensor, "*lead tokens"]
    counts: Int64[Tensor, "*lead clusters"]
    centroids: Float32[Tensor, "*lead clusters dim"]

    @cached_property
    def members(self) -> Int64[Tensor, "*lead tokens"]:
        """Token indices, cluster after cluster, ascending inside each."""
        return self.labels.argsort(dim=-1, stable=True)

    @cached_property
    def first_member(self) -> Int64[Tensor, "*lead clusters"]:
        """Where each cluster begins in `members`: sums of the counts before it."""
        return self.counts.cumsum(dim=-1) - self.counts


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
    `choose_backend`.
    """
    check_array("keys", keys)
    check_integer("n_clusters", n_clusters, least=1)
    check_integer("max_iter", max_iter, least=1)
    *lead, tokens, dim = keys.shape
    if n_clusters > tokens:
        raise ValueError(f"n_clusters must be at most the number of tokens, {tokens}, got {n_clusters}")
    if init is None:
        init = (torch.arange(n_clusters, device=keys.device) * tokens // n_clusters).expand(*lead, n_clusters)
    check_init(keys, init, n_clusters)
    chosen = choose_backend(backend, keys)
    problems = keys.shape[:-2].numel()
    flat = keys.detach().reshape(problems, tokens, dim)
    first = init.reshape(problems, *init.shape[len(lead) :])
    if not init.is_floating_point():
        first = flat.gather(1, first.long().unsqueeze(-1).expand(-1, -1, dim))
    made = fit(flat, first.float(), max_iter=max_iter, is_centred=is_centred, backend=chosen)
    return Clusters(
        made.labels.reshape(*lead, tokens),
        made.counts.reshape(*lead, n_clusters),
        made.centroids.reshape(*lead, n_clusters, dim),
    )


@dataclass(frozen=True, eq=False)
class Fit:
    """Clusters (problems, ...) and how much of the work the filter could not settle.

    `n_rows` tokens were assigned, in all rounds; `n_scored_rows` of these needed canonical scores.
    """

    labels: Int64[Tensor, "problems tokens"]
    counts: Int64[Tensor, "problems clusters"]
    centroids: Float32[Tensor, "problems clusters dim"]
    n_rows: int
    n_scored_rows: int


def fit(keys: Tensor, centroids: Tensor, *, max_iter: int, is_centred: bool = False, backend: str = "torch") -> Fit:
    """k-means of keys (problems, tokens, dim) from the given centroids (problems, clusters, dim), float32, on."""
    if not is_centred:
        return lloyd(keys, centroids, max_iter, backend)
    one_cluster = torch.zeros(keys.shape[:2], dtype=torch.int64, device=keys.device)
    mean = update(keys, one_cluster, centroids[:, :1], backend)[1]  # (problems, 1, dim)
    made = lloyd(shift(keys, -mean), shift(centroids, -mean), max_iter, backend)
    counts, centroids = update(keys, made.labels, shift(made.centroids, mean), backend)
    return Fit(made.labels, counts, centroids, made.n_rows, made.n_scored_rows)


def lloyd(keys: Tensor, centroids: Tensor, max_iter: int, backend: str) -> Fit:
    """The rounds. A problem whose labels repeat goes on without changing until those of all do."""
    labels_of = assignment_to(keys, backend)
    labels = torch.full(keys.shape[:2], -1, device=keys.device)
    counts = labels.new_zeros(centroids.shape[:2])
    n_rows = n_scored_rows = 0
    for _ in range(max_iter):
        before = labels
        labels, n_scored = labels_of(centroids)
        n_rows, n_scored_rows = n_rows + labels.numel(), n_scored_rows + n_scored
        if torch.equal(labels, before):
            break
        counts, centroids = update(keys, labels, centroids, backend)
    return Fit(labels, counts, centroids, n_rows, n_scored_rows)


def assignment_to(keys: Tensor, backend: str) -> Callable[[Tensor], tuple[Tensor, int]]:
    """What gives `keys` their labels for such and such centroids, and how many of them needed canonical scores."""
    if backend == "torch":
        unit_keys, is_safe = normalized(keys)
        return lambda centroids: assign(keys, unit_keys, is_safe, centroids)
    from .kernels.assign import assign as assign_by_kernel

    def labels_of(centroids: Tensor) -> tuple[Tensor, int]:
        labels, is_scored = assign_by_kernel(keys, centroids)
        return labels, int(is_scored.sum())

    return labels_of


def update(
    keys: Tensor, labels: Tensor, kept: Tensor, backend: str = "torch", *, away_from: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Counts and means of the clusters of `keys` (problems, tokens, dim); an empty cluster keeps what `kept` has.

    With `away_from` (problems, clusters, dim) means of |key - away_from of its cluster|.
    """
    problems, n_clusters, dim = kept.shape
    rows = keys.reshape(-1, dim)
    labels = (labels + torch.arange(problems, device=keys.device)[:, None] * n_clusters).flatten()
    counts = torch.bincount(labels, minlength=problems * n_clusters)
    if backend == "triton":
        return update_by_kernel(keys, labels, counts, kept, away_from)
    points = None if away_from is None else away_from.double().reshape(-1, dim)
    pieces = zip(
        *(x.split(max(1, WORKING_BYTES // (dim * torch.float64.itemsize))) for x in (rows, labels)), strict=True
    )
    parts = (
        (into, part.double() if points is None else (part.double() - points.index_select(0, into)).abs())
        for part, into in pieces
    )
    if keys.device.type == "cpu":
        sums = torch.full((len(counts), dim), -0.0, dtype=torch.float64)  # only -0.0 + x is x for every x
        for into, part in parts:
            sums.index_add_(0, into, part)  # on the CPU: "in the order given in index"
        means = (sums / counts.clamp(min=1).unsqueeze(-1)).float()
        means = torch.where(counts.unsqueeze(-1) > 0, means, kept.reshape(means.shape))
    else:
        is_used = counts > 0
        means = kept.reshape(-1, dim).clone()
        rows = torch.cat([part for _, part in parts])
        means[is_used] = ordered_mean(rows, (is_used.cumsum(0) - 1)[labels], counts[is_used])
    return counts.reshape(problems, n_clusters), means.reshape(kept.shape)


def update_by_kernel(
    keys: Tensor, labels: Tensor, counts: Tensor, kept: Tensor, away_from: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`update`, its means by the merge kernel; labels and counts of all problems together."""
    from .kernels.merge import merge

    problems, n_clusters, dim = kept.shape
    if away_from is not None:
        centre = away_from.double().reshape(-1, dim).index_select(0, labels).view(keys.shape)
        keys = (keys.double() - centre).abs()
    counts = counts.reshape(problems, n_clusters)
    labels = labels.reshape(keys.shape[:2]) - torch.arange(problems, device=keys.device)[:, None] * n_clusters
    means = merge(keys.unsqueeze(0), labels, counts)
    return counts, torch.where(counts.unsqueeze(-1) > 0, means, kept)


def shift(keys: Tensor, by: Tensor) -> Tensor:
    """`keys + by`, added in float64 and rounded to float32."""
    shifted = (keys.double() + by.double()).float()
    if not bool(torch.isfinite(shifted).all()):
        raise ValueError(
            f"keys must stay finite in float32 less their mean, got sizes up to {float(keys.abs().max()):.3g}"
        )
    return shifted


def check_init(keys: Tensor, init: Tensor, n_clusters: int) -> None:
    """Refuse an `init` that does not fit `keys`."""
    if not isinstance(init, Tensor):
        raise TypeError(f"init must be a torch tensor, got {type(init).__name__}")
    shape = (*keys.shape[:-2], n_clusters)
    if not init.is_floating_point() and not init.is_complex() and init.dtype != torch.bool:
        if init.shape != shape:
            raise ValueError(f"init must hold token indices of shape {shape}, got {tuple(init.shape)}")
        if init.numel() and not bool(((init >= 0) & (init < keys.shape[-2])).all()):
            raise ValueError(f"init must be from 0 to {keys.shape[-2] - 1}, got {int(init.min())} to {int(init.max())}")
        return
    check_array("init", init)
    if init.shape != (*shape, keys.shape[-1]):
        raise ValueError(f"init must hold centroids of shape {(*shape, keys.shape[-1])}, got {tuple(init.shape)}")
