"""Checks of the claims P1 to P3 of README.md: every partition of up to 16 tokens, every non-increasing similarity.

A partition is a row of booleans, True where a token is a source. Its value is the sum, over its sources, of the
similarity to the most similar destination.
"""

import itertools
from collections.abc import Callable, Iterator

import numpy as np

from kvcluster.reference import alternating_partition

from ..claims import Check

__all__ = ["check_alternating", "check_counterexamples", "check_nearest_neighbours", "check_optimal_set"]

LARGEST = 16  # tokens
Partition = Callable[[int], tuple[np.ndarray, np.ndarray]]


def all_partitions(tokens: int) -> np.ndarray:
    """Every choice of sources that leaves a destination, (2**tokens - 1, tokens)."""
    return (np.arange(2**tokens - 1)[:, None] >> np.arange(tokens) & 1).astype(bool)


def distances(is_source: np.ndarray) -> np.ndarray:
    """Distance of each source to the nearest destination, 0 for destinations, (partitions, tokens)."""
    tokens = is_source.shape[1]
    gaps = np.abs(np.arange(tokens)[:, None] - np.arange(tokens))  # (tokens, tokens)
    nearest = np.full(is_source.shape, tokens, dtype=np.int8)
    for destination in range(tokens):
        candidate = np.where(is_source[:, destination, None], tokens, gaps[destination]).astype(np.int8)
        nearest = np.minimum(nearest, candidate)
    return nearest


def half_gaps(is_source: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Smallest and largest half-gap of each partition, (partitions,) each.

    Destinations cut the sources into gaps. A gap between two destinations has two halves, of which the first is larger
    where they differ; a gap at an end of the chunk is one half.
    """
    partitions, tokens = is_source.shape
    smallest, largest = np.full(partitions, tokens), np.zeros(partitions, dtype=int)
    run, is_at_end = np.zeros(partitions, dtype=int), np.ones(partitions, dtype=bool)
    for token in range(tokens + 1):
        closes = ~is_source[:, token] if token < tokens else np.ones(partitions, dtype=bool)
        is_at_end |= token == tokens
        first, second = np.where(is_at_end, run, (run + 1) // 2), np.where(is_at_end, run, run // 2)
        largest = np.where(closes, np.maximum(largest, first), largest)
        smallest = np.where(closes, np.minimum(smallest, second), smallest)
        is_at_end &= ~closes
        run = np.where(closes, 0, run + 1)
    return smallest, largest


def largest_value(n_destinations: int, n_sources: int, threshold: int) -> int:
    """Of the similarity that is 1 up to distance `threshold` and 0 beyond: each destination serves both its sides."""
    return min(n_sources, 2 * n_destinations * threshold)


def check_alternating(partition: Partition = alternating_partition, largest: Callable = largest_value) -> Check:
    """P1: for each threshold, the partition's value is the largest of all with as many sources, which is `largest`."""
    wrong = cases = 0
    for tokens in range(2, LARGEST + 1):
        is_source = all_partitions(tokens)
        distance, n_sources = distances(is_source), is_source.sum(axis=1)
        sources, _ = partition(tokens)
        ours = np.flatnonzero((is_source == np.isin(np.arange(tokens), sources)).all(axis=1)).item()
        for threshold in range(1, tokens):
            values = (is_source & (distance <= threshold)).sum(axis=1)
            best = np.zeros(tokens, dtype=int)
            np.maximum.at(best, n_sources, values)
            wrong += int(values[ours] != best[n_sources[ours]])
            wrong += sum(int(best[m]) != largest(tokens - m, m, threshold) for m in range(tokens))
            cases += len(is_source)
    return Check("P1", "thresholds where another partition is better", cases, wrong, 0)


def is_optimal_partition(smallest: np.ndarray, largest: np.ndarray, drops: list[int]) -> np.ndarray:
    """Whether, at every distance where the similarity drops, no half-gap is longer or none is shorter."""
    optimal = np.ones(smallest.shape, dtype=bool)
    for drop in drops:
        optimal &= (largest <= drop) | (smallest >= drop)
    return optimal


def n_optimal_partitions(n_sources: int, n_destinations: int) -> int:
    """How many partitions are optimal for every non-increasing similarity: a coefficient of a polynomial."""
    polynomial = np.array([1])
    for factor in [[1, 1], [1, 1], *[[1, 1, 1]] * (n_destinations - 1)]:
        polynomial = np.convolve(polynomial, factor)
    return int(polynomial[n_sources % (2 * n_destinations)])


def check_optimal_set(is_optimal: Callable = is_optimal_partition, n_optimal: Callable = n_optimal_partitions) -> Check:
    """P2: which partitions are optimal at one threshold, at all of them, for random steps; how many they are."""
    rng = np.random.default_rng(2)
    wrong = cases = 0
    noted = 0
    for tokens in range(2, LARGEST + 1):
        is_source = all_partitions(tokens)
        distance, n_sources = distances(is_source), is_source.sum(axis=1)
        smallest, largest = half_gaps(is_source)
        single = [[drop] for drop in range(1, tokens - 1)]
        random = [sorted(rng.permutation(np.arange(1, tokens - 1))[: rng.integers(0, tokens)]) for _ in range(3)]
        everything = list(range(1, tokens - 1))
        for drops in (*single, *random, everything):
            similarity = [sum(2 ** (drop % 5) for drop in drops if drop >= d) for d in range(tokens)]
            values = np.where(is_source, np.array(similarity)[distance], 0).sum(axis=1)
            best = np.zeros(tokens, dtype=int)
            np.maximum.at(best, n_sources, values)
            is_best = values == best[n_sources]
            wrong, cases = wrong + int((is_best != is_optimal(smallest, largest, drops)).sum()), cases + len(values)
        counted = np.bincount(n_sources[is_best], minlength=tokens)  # of the last one, which drops everywhere
        wrong += sum(int(counted[m]) != n_optimal(m, tokens - m) for m in range(tokens))
        noted = counted[-(-tokens // 2)]
    n_halves = int((n_sources == LARGEST // 2).sum())
    note = f"{noted} of {n_halves:,} partitions of {LARGEST} tokens into halves are optimal"
    return Check("P2", "partitions misjudged", cases, wrong, 0, note)


def value(similarity: np.ndarray, sources: np.ndarray, destinations: np.ndarray) -> float:
    """Summed best-match similarity."""
    return float(similarity[np.ix_(sources, destinations)].max(axis=1).sum())


def similarities_of_distance(tokens: int) -> Iterator[np.ndarray]:
    """Every similarity of distance alone with values 0 and 1, as matrices (tokens, tokens)."""
    gaps = np.abs(np.arange(tokens)[:, None] - np.arange(tokens))
    for steps in itertools.product((0.0, 1.0), repeat=tokens - 1):
        yield np.array([0.0, *steps])[gaps]


def similarities_that_fall(tokens: int) -> Iterator[np.ndarray]:
    """Every symmetric similarity with values 0, 1, 2 that never rises with the distance from any token."""
    pairs = list(itertools.combinations(range(tokens), 2))
    for numbers in itertools.product((0.0, 1.0, 2.0), repeat=len(pairs)):
        similarity = np.zeros((tokens, tokens))
        for (i, j), number in zip(pairs, numbers, strict=True):
            similarity[i, j] = similarity[j, i] = number
        rows = [(similarity[i, i + 1 :], similarity[i, :i][::-1]) for i in range(tokens)]
        if all((np.diff(side) <= 0).all() for sides in rows for side in sides):
            yield similarity


def smallest_counterexample(family: Callable[[int], Iterator[np.ndarray]], partition: Partition) -> tuple[int, float]:
    """Fewest tokens at which a similarity of the family makes another partition better, and our share of its value."""
    for tokens in range(2, 6):
        sources, destinations = partition(tokens)
        worst = 1.0
        for similarity in family(tokens):
            others = itertools.combinations(range(tokens), len(sources))
            splits = ((np.array(chosen), np.setdiff1d(np.arange(tokens), chosen)) for chosen in others)
            best = max(value(similarity, *split) for split in splits)
            ours = value(similarity, sources, destinations)
            worst = min(worst, ours / best if best > 0 else 1.0)
        if worst < 1:
            return tokens, worst
    raise AssertionError("no counterexample up to 5 tokens")


def check_counterexamples(partition: Partition = alternating_partition) -> Check:
    """P3: without `non-increasing` 3 tokens break it, without `of distance alone` 4 do."""
    free = smallest_counterexample(similarities_of_distance, partition)
    falling = smallest_counterexample(similarities_that_fall, partition)
    wrong = (free != (3, 0.0)) + (falling != (4, 0.5))
    note = (
        f"rising with distance: {free[0]} tokens, {free[1]:g} of the best; "
        f"falling, but not alike everywhere: {falling[0]} tokens, {falling[1]:g} of the best"
    )
    return Check("P3", "smallest counterexamples of another size", 2, wrong, 0, note)


def check_nearest_neighbours(partition: Partition = alternating_partition) -> Check:
    """P3: if similarity falls away from every token, each source still finds its most similar token of all."""
    wrong = cases = 0
    for tokens in range(2, 5):
        sources, destinations = partition(tokens)
        for similarity in similarities_that_fall(tokens):
            best_of_all = np.where(np.eye(tokens, dtype=bool), -np.inf, similarity).max(axis=1)[sources].sum()
            wrong += bool(value(similarity, sources, destinations) != best_of_all)
            cases += 1
    return Check("P3", "sources without their best token", cases, wrong, 0)
