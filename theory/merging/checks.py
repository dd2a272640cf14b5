"""Checks of the claims M1 to M4 of README.md: what attention loses when tokens share an entry."""

import math
from collections.abc import Callable, Iterator

import numpy as np

from kvcluster.reference import Clustering, attention, clustered_attention, merge

from ..claims import Check
from .rounding import attention_rounding, lengths

__all__ = [
    "check_equal_keys",
    "check_gap",
    "check_jensen",
    "check_pair",
]

U = 2.0**-53


def random_labels(rng: np.random.Generator, shape: tuple[int, ...], entries: int) -> Clustering:
    """Random clusters, none empty."""
    labels = rng.permuted(np.broadcast_to(np.arange(shape[-1]) % entries, shape), axis=-1)
    spare = rng.integers(0, entries, shape)
    labels = np.where(np.arange(shape[-1]) < shape[-1] // 2, np.sort(labels, axis=-1), spare)
    labels[..., :entries] = np.arange(entries)
    counts = (labels[..., None] == np.arange(entries)).sum(axis=-2)
    return Clustering(labels, counts)


def check_equal_keys(counts_of: Callable[[np.ndarray], np.ndarray] = lambda counts: counts) -> Check:
    """M1: every token of a cluster has the same key, values differ; in units of what rounding allows."""
    rng = np.random.default_rng(1)
    worst, cases = 0.0, 0
    for tokens, entries, dim in ((2, 1, 3), (20, 5, 8), (65, 13, 64), (300, 20, 16)):
        for size in (0.1, 1, 10):
            clustering = random_labels(rng, (6, tokens), entries)
            distinct = (size * rng.standard_normal((6, entries, dim))).astype(np.float32)
            keys = np.take_along_axis(distinct, clustering.labels[..., None], axis=-2)
            values = rng.integers(-1000, 1000, (6, tokens, dim)) * clustering.counts.max()  # their means are exact
            values = exact_means(values, clustering)
            query, scale = rng.standard_normal((6, 4, dim)).astype(np.float32), dim**-0.5
            ours = distinct, merge(values, clustering), counts_of(clustering.counts)
            error = lengths(
                clustered_attention(query, *ours, scale=scale) - attention(query, keys, values, scale=scale)
            )
            allowed = attention_rounding(query, *ours, scale=scale) + attention_rounding(
                query, keys, values, scale=scale
            )
            worst, cases = max(worst, float((error / allowed).max())), cases + error.size
    return Check("M1", "error / rounding", cases, worst, 1)


def exact_means(values: np.ndarray, clustering: Clustering) -> np.ndarray:
    """Integer values (..., tokens, dim), moved a little so that each cluster's mean is an integer too; float32."""
    values = values.copy()
    for problem in np.ndindex(*values.shape[:-2]):
        for label, n in enumerate(clustering.counts[problem]):
            (members,) = np.nonzero(clustering.labels[problem] == label)
            values[problem][members[0]] -= values[problem][members].sum(axis=0) % n
    return values.astype(np.float32)


def logits_of_clusters() -> Iterator[np.ndarray]:
    """Logits (clusters, members), float64: narrow to wide, symmetric, with one far member, equal."""
    rng = np.random.default_rng(3)
    for members in (1, 2, 3, 8, 50):
        for width in (1e-6, 0.01, 0.3, 1, 4, 30):
            normal = width * rng.standard_normal((40, members))
            yield normal + rng.uniform(-20, 20, (40, 1))
            yield np.where(np.arange(members) == 0, width * 3, normal * 0.01)
            yield np.where(np.arange(members) == 0, -width * 3, normal * 0.01)
            yield width * np.where(np.arange(members) % 2, 1.0, -1.0) * np.ones((40, 1))


def log_sum_exp(logits: np.ndarray) -> np.ndarray:
    most = logits.max(axis=-1)
    return most + np.log(np.exp(logits - most[..., None]).sum(axis=-1))


def rounding_of_logits(logits: np.ndarray) -> np.ndarray:
    """How wrong a mean or a log-sum-exp of logits (clusters, members) can be, and their difference."""
    members = logits.shape[-1]
    return 2 * U * ((members + 6) * np.abs(logits).max(axis=-1) + 2 * members + 20)


def mean_logit(logits: np.ndarray) -> np.ndarray:
    return logits.mean(axis=-1)


def check_jensen(representative: Callable[[np.ndarray], np.ndarray] = mean_logit) -> Check:
    """M2: the centroid's logit plus log count, less the log of what the tokens weigh together."""
    worst, cases = -math.inf, 0
    for logits in logits_of_clusters():
        excess = representative(logits) + math.log(logits.shape[-1]) - log_sum_exp(logits)
        worst, cases = max(worst, float((excess - rounding_of_logits(logits)).max())), cases + len(logits)
    return Check("M2", "logit above its tokens', less rounding", cases, worst, 0)


def gap_bounds(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """M3: smallest and largest gap that the variance, the width and the highest logit allow."""
    variance, mean = logits.var(axis=-1), logits.mean(axis=-1)
    width, above = logits.max(axis=-1) - logits.min(axis=-1), logits.max(axis=-1) - mean
    return variance * second_order(-width), variance * second_order(above)


def second_order(z: np.ndarray) -> np.ndarray:
    """`(exp(z) - 1 - z) / z**2`, 1/2 at 0."""
    small = np.abs(z) < 1e-3
    safe = np.where(small, 1.0, z)
    series = 0.5 + z / 6 + z**2 / 24 + z**3 / 120
    return np.where(small, series, (np.expm1(safe) - safe) / safe**2)


def check_gap(bounds: Callable = gap_bounds) -> Check:
    """M3: what Jensen's inequality gives away, between its bounds; beside half of the variance."""
    worst, cases = -math.inf, 0
    for logits in logits_of_clusters():
        gap = log_sum_exp(logits) - math.log(logits.shape[-1]) - logits.mean(axis=-1)
        lower, upper = bounds(logits)
        allowed = rounding_of_logits(logits) + 2.0**-30 * upper  # the bounds are rounded too, see README.md
        worst = max(worst, float((np.maximum(gap - upper, lower - gap) - allowed).max()))
        cases += len(gap)
    return Check("M3", "gap outside of its bounds, less rounding", cases, worst, 0)


def error_of_cluster(share: np.ndarray, logits: np.ndarray, values: np.ndarray, output: np.ndarray) -> np.ndarray:
    """M4: what merging one cluster takes from the output, (trials, dim).

    Parameters
    ----------
    share : (trials,), weight of the entry; logits : (trials, members); values : (trials, members, dim);
    output : (trials, dim), of the clustered attention.
    """
    tilt = np.expm1(logits - logits.mean(axis=-1, keepdims=True))  # (trials, members)
    mean_value = values.mean(axis=-2)
    surplus = tilt.mean(axis=-1)  # A - 1
    covariance = (tilt[..., None] * (values - mean_value[:, None])).mean(axis=-2)  # B
    away = mean_value - output
    return share[:, None] * (surplus[:, None] * away + covariance) / (1 + share * surplus)[:, None]


def error_of_pair(share: np.ndarray, logits: np.ndarray, values: np.ndarray, output: np.ndarray) -> np.ndarray:
    """The same for two tokens, from half of their logits' and values' difference."""
    half, difference = (logits[:, 0] - logits[:, 1]) / 2, (values[:, 0] - values[:, 1]) / 2
    surplus = 2 * np.sinh(half / 2) ** 2  # cosh - 1
    away = values.mean(axis=1) - output
    return (
        share[:, None]
        * (surplus[:, None] * away + np.sinh(half)[:, None] * difference)
        / (1 + share * surplus)[:, None]
    )


def first_order(share: np.ndarray, logits: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Share times half the logits' difference times half the values' difference, (trials, dim)."""
    return share[:, None] * (logits[:, 0] - logits[:, 1])[:, None] * (values[:, 0] - values[:, 1]) / 4


def check_pair(pair: Callable = error_of_pair, leading: Callable = first_order) -> Check:
    """M4: one cluster merged among exact tokens: true error beside the closed forms and the first order."""
    rng = np.random.default_rng(4)
    worst, cases, missed = 0.0, 0, []
    for members, size in [(2, 0.001), (2, 0.1), (2, 1), (2, 3), (3, 1), (5, 0.1), (5, 3)]:
        cluster, output, error, allowed = merged_cluster(rng, members, size)
        forms = [error_of_cluster(*cluster, output), *([pair(*cluster, output)] if members == 2 else [])]
        for form in forms:
            worst, cases = max(worst, float((lengths(error - form) / allowed).max())), cases + len(error)
        if members == 2:
            missing = lengths(error - leading(*cluster))
            worst = max(worst, float((missing / (remainder(*cluster, output) + allowed)).max()))
            missed.append(f"{np.median(missing / lengths(error)):.1%} at {size}")
    note = f"the first order misses of the error, by size of the pair's keys: {', '.join(missed)}"
    return Check("M4", "difference / rounding, rest / bound", cases, worst, 1, note)


def merged_cluster(
    rng: np.random.Generator, members: int, size: float
) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray], np.ndarray, np.ndarray, np.ndarray]:
    """Share, logits and values of the cluster of each of 100 trials; clustered output, its error, and rounding."""
    trials, others, dim, scale = 100, 6, 4, 0.5
    query = rng.standard_normal((trials, 1, dim)).astype(np.float32)
    merged = symmetric(rng, (trials, members, dim), size)
    exact = rng.integers(-64, 65, (trials, others, 2 * dim)) / np.float32(32)
    keys, values = np.split(np.concatenate([merged, exact], axis=1).astype(np.float32), 2, axis=-1)
    counts = np.array([members] + [1] * others) * np.ones((trials, 1), dtype=int)
    merged_keys, merged_values = (
        np.concatenate([a[:, :members].mean(axis=1, keepdims=True), a[:, members:]], axis=1) for a in (keys, values)
    )
    output = clustered_attention(query, merged_keys, merged_values, counts, scale=scale)[:, 0]
    error = attention(query, keys, values, scale=scale)[:, 0] - output

    logits = scale * (keys.astype(np.float64) @ query.astype(np.float64)[:, 0, :, None])[..., 0]
    most, mean = logits.max(axis=1), logits[:, :members].mean(axis=1)
    alone = members * np.exp(mean - most)
    share = alone / (alone + np.exp(logits[:, members:] - most[:, None]).sum(axis=1))
    rounding = np.maximum(
        attention_rounding(query, keys, values, scale=scale),
        attention_rounding(query, merged_keys, merged_values, counts, scale=scale),
    )[:, 0]
    highest = np.abs(logits[:, :members] - mean[:, None]).max(axis=1)
    cluster = share, logits[:, :members], values[:, :members].astype(np.float64)
    return cluster, output, error, 16 * np.exp(highest) * rounding  # see README.md


def symmetric(rng: np.random.Generator, shape: tuple[int, int, int], size: float) -> np.ndarray:
    """Keys of that size, then values of size 1, (trials, members, 2 dim): multiples of 2**-12, and their means too."""
    trials, members, dim = shape
    steps = np.round(np.repeat([size, 1], dim) * rng.standard_normal((trials, members, 2 * dim)) * 2**12)
    steps[:, 0] -= steps.sum(axis=1) % members
    return steps * 2.0**-12


def remainder(share: np.ndarray, logits: np.ndarray, values: np.ndarray, output: np.ndarray) -> np.ndarray:
    """M4: most that the first order leaves of a pair's error, (trials,); of second order in the logits' difference."""
    half, difference = np.abs(logits[:, 0] - logits[:, 1]) / 2, lengths(values[:, 0] - values[:, 1]) / 2
    surplus = np.cosh(half) - 1
    away = lengths(values.mean(axis=1) - output)
    return share * (surplus * (away + half * difference) + (np.sinh(half) - half) * difference)
