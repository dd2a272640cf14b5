"""Clusters in the order in which a query recalls them: canonical scores of all of them, then a stable sort.

There is no filter: a GPU reads the clusters' features more slowly than it adds their products in float64, so that
deciding which scores may stay inexact, for which the host has to wait, would gain nothing. Nor is there a kernel for
sort, prefix sum and trim: torch has them on the device, for any number of clusters.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..exact.scores import ScoredClusters, spend
from .canonical import halving_sum

__all__ = ["BLOCK_CLUSTERS", "N_WARPS", "cluster_scores", "cluster_scores_kernel", "rank", "take"]

BLOCK_CLUSTERS = 4  # clusters of a program; more of them would spill registers
N_WARPS = 4


def take(probe: Tensor, clusters: ScoredClusters, counts: Tensor, budget: int) -> Tensor:
    """Tokens taken of each cluster, whole clusters by descending score."""
    return spend(rank(probe, clusters.features, clusters.mean), counts, budget)


def rank(probe: Tensor, features: Tensor, mean: Tensor) -> Tensor:
    """Clusters (problems, clusters), int64, by descending score, of ties the first; parameters as `cluster_scores`."""
    scores = cluster_scores(probe, features, mean) + 0.0  # -0.0 ties with 0.0, in a sort by bits too
    return scores.argsort(dim=-1, descending=True, stable=True)


def cluster_scores(probe: Tensor, features: Tensor, mean: Tensor) -> Tensor:
    """Score of each cluster for the whole group, (problems, clusters), float64: `kvcluster.reference.cluster_scores`.

    Parameters
    ----------
    probe : (problems, group, 2 * dim), float32, as `make_probe` gives it; dim at most 256.
    features : (problems, clusters, 2 * dim), bfloat16 or float32: centroids, then deviations.
    mean : (problems, 1, 2 * dim), float32: those of the mean cluster.
    """
    problems, clusters, two_dims = features.shape
    scores = torch.empty(problems, clusters, dtype=torch.float64, device=features.device)
    if scores.numel() == 0:
        return scores
    dim = two_dims // 2
    block_dim = triton.next_power_of_2(dim)
    blocks = triton.cdiv(clusters, BLOCK_CLUSTERS)
    cluster_scores_kernel[(problems * blocks,)](
        probe.contiguous(),
        features.contiguous(),
        mean.contiguous(),
        scores,
        blocks,
        clusters,
        probe.shape[1],
        DIM=dim,
        BLOCK_DIM=block_dim,
        STEPS=block_dim.bit_length() - 1,
        CLUSTERS=BLOCK_CLUSTERS,
        num_warps=N_WARPS,
    )
    return scores


@triton.jit
def load_features(rows, row, is_there, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """Both halves, (rows, BLOCK_DIM) each, in float64, of the rows `row`; zeros where there are none."""
    feature = tl.arange(0, BLOCK_DIM)
    pointers = rows + row[:, None] * (2 * DIM) + feature[None, :]
    mask = is_there[:, None] & (feature < DIM)[None, :]
    low = tl.load(pointers, mask=mask, other=0.0).to(tl.float64)
    return low, tl.load(pointers + DIM, mask=mask, other=0.0).to(tl.float64)


@triton.jit
def cluster_scores_kernel(
    probe,
    features,
    mean,
    scores_out,
    blocks,
    clusters,
    group,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    STEPS: tl.constexpr,
    CLUSTERS: tl.constexpr,
):
    """One program: CLUSTERS clusters of one problem, for one query of its group after the other."""
    problem = (tl.program_id(0) // blocks).to(tl.int64)
    cluster = (tl.program_id(0) % blocks).to(tl.int64) * CLUSTERS + tl.arange(0, CLUSTERS)
    is_cluster = cluster < clusters
    zero = tl.zeros((1,), tl.int64)
    centroid, deviation = load_features(features + problem * clusters * 2 * DIM, cluster, is_cluster, DIM, BLOCK_DIM)
    mean_centroid, mean_deviation = load_features(mean, zero + problem, zero == 0, DIM, BLOCK_DIM)
    scores = tl.full((CLUSTERS,), float("-inf"), tl.float64)
    for query in range(0, group):
        q, reach = load_features(probe, zero + problem * group + query, zero == 0, DIM, BLOCK_DIM)  # (1, BLOCK_DIM)
        mean_score = halving_sum(q * mean_centroid + reach * mean_deviation, 1, BLOCK_DIM, STEPS)
        raw_scores = halving_sum(q * centroid + reach * deviation, CLUSTERS, BLOCK_DIM, STEPS)
        scores = tl.maximum(scores, raw_scores - mean_score)
    tl.store(scores_out + problem * clusters + cluster, scores, mask=is_cluster)
