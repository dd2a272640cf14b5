"""Checks of the claims P9 and P10 of README.md: what the condition of theorem 6.1 gives, and what less of it gives.

A similarity of distance alone is a row f with f[x] the similarity at distance x; f[0], of a token with itself, is not
matched. All numbers are integers, so sums are exact.
"""

import itertools
from collections.abc import Callable, Iterator

import numpy as np

from kvcluster.reference import alternating_partition

from ..claims import Check
from .checks import Partition, all_partitions, half_gaps

__all__ = [
    "check_all_pairs",
    "check_convex_optima",
    "check_four_tokens",
    "check_moving_windows",
    "check_nearest_is_enough",
    "moving_windows",
]

LARGEST = 12  # tokens
Family = Callable[[int], Iterator[np.ndarray]]


def hinges(tokens: int) -> Iterator[np.ndarray]:
    """Similarities max(D - x, 0): with a constant, every convex non-increasing one is a sum of multiples of them."""
    for zero in range(2, tokens + 1):
        yield np.maximum(zero - np.arange(tokens), 0)


def convex_similarities(tokens: int) -> Iterator[np.ndarray]:
    """All `hinges`, then random sums of them and a constant."""
    rays = list(hinges(tokens))
    yield from rays
    rng = np.random.default_rng(tokens)
    for _ in range(8):
        weights = rng.integers(0, 4, len(rays)) * (rng.random(len(rays)) < 0.5)
        if any(ray[1] > ray[-1] for ray, weight in zip(rays, weights, strict=True) if weight):  # not constant
            yield sum((int(w) * ray for w, ray in zip(weights, rays, strict=True)), np.full(tokens, rng.integers(3)))


def thresholds(tokens: int) -> Iterator[np.ndarray]:
    """Similarities that are 1 up to a distance and 0 beyond: non-increasing, and convex only if that is 1."""
    for distance in range(1, tokens):
        yield (np.arange(tokens) <= distance).astype(int)


def largest_at_one(tokens: int) -> Iterator[np.ndarray]:
    """Every similarity with values 0 and 1 that is 1 at distance 1, then random ones of which none exceeds f[1]."""
    for rest in itertools.product((0, 1), repeat=tokens - 2):
        yield np.array([1, 1, *rest])
    rng = np.random.default_rng(tokens)
    for _ in range(20):
        yield np.array([9, 9, *rng.integers(-9, 10, tokens - 2)])


def matrix_of(f: np.ndarray) -> np.ndarray:
    """Similarity of all pairs, (tokens, tokens)."""
    return f[np.abs(np.arange(len(f))[:, None] - np.arange(len(f)))]


def sorted_matches(f: np.ndarray, is_source: np.ndarray) -> np.ndarray:
    """Each partition's best matches, best first, (partitions, tokens); far below all numbers where there are none."""
    nothing = -(10**6)
    similar = np.where(is_source[:, None, :], nothing, matrix_of(f))  # (partitions, tokens, destinations)
    return -np.sort(-np.where(is_source, similar.max(axis=-1), nothing), axis=-1)


def place_of(partition: Partition, is_source: np.ndarray) -> int:
    """Which row is ours."""
    tokens = is_source.shape[1]
    ours = np.isin(np.arange(tokens), partition(tokens)[0])
    return int(np.flatnonzero((is_source == ours).all(axis=1)).item())


def check_nearest_is_enough(partition: Partition = alternating_partition, family: Family = largest_at_one) -> Check:
    """P9: the sum of the k best matches, for every k, beside all partitions that have k sources."""
    wrong = cases = 0
    for tokens in range(2, 9):
        is_source = all_partitions(tokens)
        ours, n_sources = place_of(partition, is_source), is_source.sum(axis=1)
        for f in family(tokens):
            sums = sorted_matches(f, is_source).cumsum(axis=1)
            for k in range(1, int(n_sources[ours]) + 1):
                able = n_sources >= k
                wrong += int((sums[able, k - 1] > sums[ours, k - 1]).any())
                cases += int(able.sum())
    return Check("P9", "cuts where another partition is better", cases, wrong, 0)


def check_convex_optima(family: Family = convex_similarities) -> Check:
    """P9: with up to two sources for each destination, exactly those without a half-gap above 1 are optimal."""
    wrong = cases = 0
    for tokens in range(3, LARGEST + 1):
        is_source = all_partitions(tokens)
        n_sources = is_source.sum(axis=1)
        _, largest = half_gaps(is_source)
        few = (n_sources >= 1) & (n_sources <= 2 * (tokens - n_sources))
        for f in family(tokens):
            if f[1] == f[-1]:  # constant: every partition is optimal
                continue
            is_match = np.arange(tokens) < n_sources[:, None]
            values = np.where(is_match, sorted_matches(f, is_source), 0).sum(axis=1)
            best = np.full(tokens + 1, -1)
            np.maximum.at(best, n_sources, values)
            is_best = values == best[n_sources]
            wrong += int((is_best != (largest <= 1))[few].sum())
            cases += int(few.sum())
    return Check("P9", "partitions misjudged", cases, wrong, 0)


def pair_sums(f: np.ndarray, is_source: np.ndarray) -> np.ndarray:
    """Summed similarity of every source with every destination, (partitions,)."""
    return np.einsum("pi,ij,pj->p", is_source.astype(int), matrix_of(f), (~is_source).astype(int), optimize=True)


def pairs_of_windows(tokens: int, zero: int) -> int:
    """The largest sum over all pairs for max(zero - x, 0): every window of `zero` tokens is split as evenly as it can.

    >>> pairs_of_windows(3, 2)  # windows 0, 01, 12, 2
    2
    """
    sizes = [min(first + zero, tokens) - max(first, 0) for first in range(1 - zero, tokens)]
    return sum((size // 2) * ((size + 1) // 2) for size in sizes)


def check_all_pairs(partition: Partition = alternating_partition, family: Family = hinges) -> Check:
    """P10: the sum over all pairs, beside every partition; for hinges it is what the windows allow."""
    wrong = cases = 0
    for tokens in range(2, LARGEST + 1):
        is_source = all_partitions(tokens)
        ours = place_of(partition, is_source)
        for zero, f in enumerate(family(tokens), start=2):
            sums = pair_sums(f, is_source)
            wrong += int(sums[ours] < sums.max()) + int(
                family is hinges and sums[ours] != pairs_of_windows(tokens, zero)
            )
            cases += len(sums)
    return Check("P10", "similarities where another partition is better", cases, wrong, 0)


def is_convex(f: np.ndarray) -> bool:
    """The condition of theorem 6.1."""
    drops = -np.diff(f[1:])
    return bool((drops >= 0).all() and (np.diff(drops) <= 0).all())


def check_four_tokens(condition: Callable[[np.ndarray], bool] = is_convex) -> Check:
    """P10: for which non-increasing similarities of four tokens no other halves have a larger sum over all pairs."""
    is_source = all_partitions(4)
    is_source = is_source[is_source.sum(axis=1) == 2]
    ours = place_of(alternating_partition, is_source)
    wrong = cases = 0
    for steps in itertools.combinations_with_replacement(range(9, -1, -1), 3):
        f = np.array([9, *steps])
        sums = pair_sums(f, is_source)
        wrong, cases = wrong + (condition(f) != bool(sums[ours] == sums.max())), cases + 1
    return Check("P10", "similarities of four tokens misjudged", cases, wrong, 0)


def moving_windows(f: np.ndarray) -> np.ndarray:
    """Keys (tokens, features) of zeros and ones whose dot products are f of the distance.

    A feature is a window of tokens in a row: it is 1 for these and 0 for the others. f holds integers, none negative,
    with f[0] - f[1] >= f[1] - f[2] >= ... >= 0.

    >>> moving_windows(np.array([2, 1]))
    array([[1, 1, 0],
           [1, 0, 1]])
    """
    tokens = len(f)
    drops = [*-np.diff(f), 0]
    features = [np.ones(tokens, dtype=int)] * int(f[-1])
    for length in range(1, tokens):
        windows = [np.arange(tokens) - first for first in range(1 - length, tokens)]
        wanted = [((place >= 0) & (place < length)).astype(int) for place in windows]
        features += wanted * int(drops[length - 1] - drops[length])
    return np.stack(features, axis=1)


def check_moving_windows(keys_of: Callable[[np.ndarray], np.ndarray] = moving_windows) -> Check:
    """P10: dot products of the keys, beside the similarity that they were made for."""
    rng = np.random.default_rng(10)
    wrong = cases = 0
    for tokens in range(2, LARGEST + 1):
        for _ in range(5):
            drops = np.sort(rng.integers(0, 4, tokens - 1))  # of the last distance first: no drop above one before it
            f = np.concatenate([[0], drops.cumsum()])[::-1] + rng.integers(1, 3)
            keys = keys_of(f)
            wrong += int((keys @ keys.T != matrix_of(f)).any())
            cases += 1
    return Check("P10", "similarities that the keys do not have", cases, wrong, 0)
