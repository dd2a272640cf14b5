"""Attacks on the claims E8 and E9 of README.md: recall's clusters and selections have the reference's bits."""

from collections.abc import Callable, Iterator

import numpy as np
import torch

from kvcluster import fast, reference
from kvcluster.fast.exact.scores import ScoredClusters, approximate_scores, make_probe, score_clusters
from kvcluster.reference.cluster_scores import cluster_scores

from ..claims import Check
from .inputs import keys_of_kinds

__all__ = ["check_kmeans", "check_lead", "check_selection"]

SPREAD = 0.5
Scores = Callable[[torch.Tensor, ScoredClusters], tuple[torch.Tensor, torch.Tensor]]


def check_kmeans() -> Check:
    """E8: labels, counts and centroids of the torch path, byte for byte, on every kind of keys."""
    wrong = cases = 0
    for dim in (1, 64, 80):
        for kind in keys_of_kinds(90, dim, seed=80 + dim):
            for keys, n_clusters in ((kind, 9), (kind.astype(np.float16), 90), (kind * np.float32(1e-38), 4)):
                expected = reference.kmeans(keys, n_clusters=n_clusters, max_iter=4)
                clusters = fast.kmeans(torch.from_numpy(keys), n_clusters=n_clusters, max_iter=4)
                pairs = [(getattr(clusters, name).numpy(), getattr(expected, name)) for name in ("labels", "centroids")]
                wrong += any(a.tobytes() != b.tobytes() for a, b in pairs)
                cases += 1
    return Check("E8", "clusterings that differ", cases, wrong, 0)


def scored() -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """Query (1, group, dim), centroids and deviations (1, clusters, dim), counts (1, clusters); far, alike, tied."""
    rng = np.random.default_rng(90)
    for dim in (1, 3, 16, 64, 129):
        for group in (1, 4):
            query = rng.standard_normal((1, group, dim))
            centroids = rng.standard_normal((1, 40, dim))
            deviations = np.abs(rng.standard_normal((1, 40, dim)))
            far = centroids + 300 * rng.standard_normal((1, 1, dim))  # a large part that all share
            near = centroids[:, :1] * (1 + 2.0**-22 * rng.integers(-2, 3, (1, 40, dim)))
            for centres, widths in (
                (centroids, deviations),
                (far, deviations),
                (near, 0 * deviations),
                (np.sign(far), near),
            ):
                counts = rng.integers(0, 9, (1, 40))
                rounded = [x.astype(np.float32) for x in (query, centres, np.abs(widths))]
                yield rounded[0], rounded[1], rounded[2], counts


def check_lead(scores: Scores = approximate_scores) -> Check:
    """E9: how much more than its lead two float32 scores can differ from what the canonical ones do."""
    worst, cases = 0.0, 0
    for query, centroids, deviations, counts in scored():
        exact = cluster_scores(query, centroids, counts, deviations, SPREAD)[0]
        features = torch.from_numpy(np.concatenate([centroids, deviations], axis=-1))
        cluster_features = score_clusters(features, torch.from_numpy(counts))
        filtered, lead = scores(make_probe(torch.from_numpy(query), SPREAD), cluster_features)
        errors = filtered[0].double().numpy() - exact
        worst = max(worst, float((errors.max() - errors.min()) / max(float(lead[0, 0]), 1e-300)))
        cases += len(errors) ** 2
    return Check("E9", "error of a comparison / lead", cases, worst, 1)


def check_selection() -> Check:
    """E9: tokens taken by the torch path, with every budget from nothing to everything."""
    wrong = cases = 0
    for query, centroids, deviations, counts in scored():
        tensors = [torch.from_numpy(x) for x in (query, centroids, counts, deviations)]
        for budget in (0, 1, 17, 60, 100, 400):
            right = reference.select_clusters(query, centroids, counts, budget=budget, deviations=deviations)
            selection = fast.select_clusters(*tensors[:3], budget=budget, deviations=tensors[3])
            wrong += not np.array_equal(selection.taken.numpy(), right.taken)
            cases += 1
    return Check("E9", "selections that differ", cases, wrong, 0)
