"""How near clusters lie to a query, or to the queries of a group: one number per cluster, the same on every machine."""

import numpy as np
from jaxtyping import Float, Float64, Int

from .kmeans import update
from .similarity import halving_sum

__all__ = ["cluster_scores"]


def cluster_scores(
    query: Float[np.ndarray, "*lead group dim"],
    centroids: Float[np.ndarray, "*lead clusters dim"],
    counts: Int[np.ndarray, "*lead clusters"],
    deviations: Float[np.ndarray, "*lead clusters dim"],
    spread: float,
) -> Float64[np.ndarray, "*lead clusters"]:
    """Score of each cluster for the whole group.

    Notes
    -----
    The score of cluster c is the maximum over the group's queries q of

        q . centroid_c + spread * |q| . deviation_c   minus the same of the mean cluster

    where |q| and the mean over all clusters that are not empty are taken feature by feature. The second term finds
    clusters in which some key may score well although their centroid does not. Without the third, a query to which all
    keys are near would outvote the others. For one query without deviations the ranking is that of `q . centroid`,
    as in ClusterKV (arXiv:2412.03213, without log counts); deviations and group are our choices.

    Sums over features are halving sums of exact products in float64 (see `similarity`); `spread * |q|` and the mean
    cluster are rounded to float32.

    Examples
    --------
    Two queries. To the first, all centroids are alike; the second tells them apart:

    >>> query = np.array([[8, 0], [0, 1]], dtype=np.float32)
    >>> centroids = np.array([[5, 1], [5, 3]], dtype=np.float32)
    >>> cluster_scores(query, centroids, np.array([1, 1]), np.zeros_like(centroids), 0.5)
    array([0., 1.])
    """
    reach = (float(spread) * np.abs(query.astype(np.float64))).astype(np.float32)
    means = [mean_cluster(array, counts) for array in (centroids, deviations)]
    scores = dots(query, centroids, reach, deviations) - dots(query, means[0], reach, means[1])
    return scores.max(axis=-2)


def dots(query: np.ndarray, centroids: np.ndarray, reach: np.ndarray, deviations: np.ndarray) -> np.ndarray:
    """`query . centroid + reach . deviation`, (..., group, clusters), float64."""
    products = [
        a.astype(np.float64)[..., :, None, :] * b.astype(np.float64)[..., None, :, :]  # (..., group, clusters, dim)
        for a, b in ((query, centroids), (reach, deviations))
    ]
    return halving_sum(products[0] + products[1])


def mean_cluster(array: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Mean of the rows of `array` (..., clusters, dim) whose count is not 0, (..., 1, dim), float32; 0 for none."""
    means = np.zeros((*array.shape[:-2], 1, array.shape[-1]), dtype=np.float32)
    for problem in np.ndindex(*array.shape[:-2]):
        rows = array[problem][counts[problem] > 0]
        means[problem] = update(rows, np.zeros(len(rows), dtype=np.int64), means[problem])
    return means
