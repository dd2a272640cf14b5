"""Checks of claim P12 of README.md: what one step makes of entries, and what that means for the steps after it.

Keys are given by their dot products, f of the distance, as fractions. So similarities of centroids (the canonical ones,
signed squares of cosines), their ties and spreads are exact.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np

from kvcluster.reference.soft_matching import match_round

from ..claims import Check
from .convexity import convex_similarities, hinges, is_convex, moving_windows
from .optimal import all_clusterings

__all__ = ["check_first_step", "check_least_spread", "check_rounds", "check_runs", "even_sources", "odd_sources"]

Cluster = tuple[int, ...]  # its tokens
Sources = Callable[[int], tuple[int, ...]]


def even_sources(size: int) -> tuple[int, ...]:
    """Ours."""
    return tuple(range(0, size, 2))


def odd_sources(size: int) -> tuple[int, ...]:
    """The other alternation."""
    return tuple(range(1, size, 2))


@dataclass(eq=False)
class Keys:
    """Keys whose dot products are `f[distance]`; what is computed of clusters is kept."""

    f: tuple[Fraction, ...]
    dots: dict[tuple[Cluster, Cluster], Fraction] = field(default_factory=dict)

    def dot(self, a: Cluster, b: Cluster) -> Fraction:
        """Of the sums of two clusters' keys."""
        if (a, b) not in self.dots:
            self.dots[a, b] = sum((self.f[abs(i - j)] for i, j in itertools.product(a, b)), Fraction())
        return self.dots[a, b]

    def similarity(self, a: Cluster, b: Cluster) -> Fraction:
        """Canonical similarity of two centroids; the lengths of sums and means cancel."""
        return self.dot(a, b) * abs(self.dot(a, b)) / (self.dot(a, a) * self.dot(b, b))

    def spread(self, clusters: tuple[Cluster, ...]) -> Fraction:
        """Summed squared distance of keys to the mean of their cluster."""
        return sum((len(c) * self.f[0] - self.dot(c, c) / len(c) for c in clusters), Fraction())

    def step(self, clusters: tuple[Cluster, ...], sources: tuple[int, ...], n_merged: int) -> "Step":
        """One step in one chunk: of ties, the first destination and the first source."""
        destinations = [entry for entry in range(len(clusters)) if entry not in sources]
        matches = []
        for source in sources:
            similar = [self.similarity(clusters[source], clusters[entry]) for entry in destinations]
            matches.append((-max(similar), source, destinations[similar.index(max(similar))]))
        tokens = {entry: list(cluster) for entry, cluster in enumerate(clusters)}
        merged = sorted(matches)[:n_merged]
        for _, source, destination in merged:
            tokens[destination] += tokens.pop(source)
        return Step(
            tuple(tuple(sorted(cluster)) for cluster in tokens.values()),
            -sum((match[0] for match in merged), Fraction()),
        )


@dataclass(frozen=True)
class Step:
    """What a step leaves, and the similarity that it merged."""

    clusters: tuple[Cluster, ...]
    value: Fraction


def tokens_alone(n: int) -> tuple[Cluster, ...]:
    return tuple((token,) for token in range(n))


def falling(tokens: int) -> Iterator[tuple[Fraction, ...]]:
    """Convex similarities with f(1) > f(2): hinges, and halves from token to token."""
    for f in hinges(tokens):
        yield tuple(Fraction(int(number)) for number in f)
    yield tuple(Fraction(1, 2**distance) for distance in range(tokens))


def least_spread(f: tuple[Fraction, ...], n_merged: int) -> Fraction:
    """No clustering with `n_merged` merges leaves less."""
    return n_merged * (f[0] - f[1])


def check_least_spread(bound: Callable[[tuple[Fraction, ...], int], Fraction] = least_spread) -> Check:
    """P12: the spread of every clustering of up to 7 tokens, beside the bound, which pairs of neighbours reach."""
    wrong = cases = 0
    for tokens in range(2, 8):
        for keys in map(Keys, falling(tokens)):
            for clusters in range(1, tokens + 1):
                spreads = []
                for labels in all_clusterings(tokens, clusters):
                    members = (np.flatnonzero(labels == label).tolist() for label in range(clusters))
                    spreads.append(keys.spread(tuple(map(tuple, members))))
                least = bound(keys.f, tokens - clusters)
                wrong += sum(spread < least for spread in spreads)
                wrong += min(spreads) != least if 2 * clusters >= tokens else 0
                cases += len(spreads)
    return Check("P12", "clusterings of less spread", cases, int(wrong), 0)


def excess_of_even_sources(f: tuple[Fraction, ...], n_merged: int) -> Fraction:
    """Two sources share the first destination as soon as two merge."""
    return Fraction(2, 3) * (f[1] - f[2]) if n_merged >= 2 else Fraction()


def check_first_step(excess: Callable[[tuple[Fraction, ...], int], Fraction] = excess_of_even_sources) -> Check:
    """P12: what even and odd sources leave beyond the least spread; and that the reference makes these clusters."""
    wrong = cases = 0
    for tokens in range(3, 13):
        windows = [moving_windows(f).astype(np.float32) for f in hinges(tokens)]
        for n_merged in range(1, tokens // 2 + 1):
            for number, keys in enumerate(map(Keys, falling(tokens))):
                even, odd = (
                    keys.step(tokens_alone(tokens), sources(tokens), n_merged).clusters
                    for sources in (even_sources, odd_sources)
                )
                least = least_spread(keys.f, n_merged)
                wrong += keys.spread(even) - least != excess(keys.f, n_merged)
                wrong += keys.spread(odd) != least
                if number < len(windows):
                    labels = match_round(windows[number], n_merged)
                    wrong += {tuple(np.flatnonzero(labels == label)) for label in set(labels)} != set(even)
                cases += 1
    return Check("P12", "first steps that end otherwise", cases, int(wrong), 0)


def similarity_of_runs(f: tuple[Fraction, ...], length: int, distance: int) -> Fraction:
    """Dot product of the sums of two runs of `length` tokens that are `distance` runs apart."""
    return sum(((length - abs(j)) * f[abs(length * distance + j)] for j in range(1 - length, length)), Fraction())


def check_runs(dot: Callable[[tuple[Fraction, ...], int, int], Fraction] = similarity_of_runs) -> Check:
    """P12: similarities of runs of equal length depend on their distance, do not rise with it, and stay convex."""
    rng = np.random.default_rng(13)
    wrong = cases = 0
    for length, n_runs in [(2, 6), (3, 4), (4, 4), (5, 3)]:
        tokens = length * n_runs
        any_fall = [np.sort(rng.integers(0, 20, tokens))[::-1] for _ in range(5)]
        for numbers in (*any_fall, *convex_similarities(tokens)):
            keys = Keys(tuple(Fraction(int(number)) for number in numbers))
            runs = [tuple(range(first, first + length)) for first in range(0, tokens, length)]
            found = np.array([dot(keys.f, length, distance) for distance in range(n_runs)])
            for a, b in itertools.product(range(n_runs), repeat=2):
                wrong += keys.dot(runs[a], runs[b]) != found[abs(a - b)]
            wrong += bool((np.diff(found) > 0).any()) + (is_convex(numbers) and not is_convex(found))
            cases += 1
    return Check("P12", "runs whose similarity is another", cases, int(wrong), 0)


def outcomes(keys: Keys, clusters: tuple[Cluster, ...], target: int, choices: Callable) -> Iterator[Step]:
    """Total similarity and clusters at the end, for every choice of sources in every step."""
    size = len(clusters)
    if size == target:
        yield Step(clusters, Fraction())
        return
    for sources in choices(size):
        step = keys.step(clusters, sources, min(size // 2, size - target))
        for end in outcomes(keys, step.clusters, target, choices):
            yield Step(end.clusters, step.value + end.value)


def all_halves(size: int) -> list[tuple[int, ...]]:
    """Every choice of half of the entries as sources; of an odd number, either half."""
    numbers = {size // 2, size - size // 2}
    return [sources for n_sources in numbers for sources in itertools.combinations(range(size), n_sources)]


def loses_everywhere(
    tokens: int, target: int, ours: tuple[Sources, ...], worth: Callable[[Keys, Step], Fraction]
) -> bool:
    """Whether, for every similarity tried, another choice ends with more worth than each of `ours`."""
    for keys in map(Keys, falling(tokens)):
        best = max(worth(keys, end) for end in outcomes(keys, tokens_alone(tokens), target, all_halves))
        for sources in ours:
            (end,) = outcomes(keys, tokens_alone(tokens), target, lambda size, sources=sources: [sources(size)])
            if worth(keys, end) == best:
                return False
    return True


def first_loss(ours: tuple[Sources, ...], worth: Callable[[Keys, Step], Fraction]) -> tuple[int, int]:
    """Fewest tokens, and the largest target above 1 for these, at which all of `ours` lose for every similarity."""
    sizes = ((tokens, target) for tokens in range(3, 10) for target in range(tokens - 1, 1, -1))
    return next(size for size in sizes if loses_everywhere(*size, ours, worth))


def check_rounds(ours: tuple[Sources, ...] = (even_sources, odd_sources)) -> Check:
    """P12: the smallest sizes at which steps of alternation, even or odd, do not end best for any similarity tried."""
    merged = first_loss(ours, lambda keys, end: end.value)
    least = first_loss(ours, lambda keys, end: -keys.spread(end.clusters))
    wrong = (merged != (7, 2)) + (least != (9, 3))
    note = (
        f"more similarity is merged by another choice from {merged[0]} tokens to {merged[1]} on, "
        f"less spread is left from {least[0]} to {least[1]} on"
    )
    return Check("P12", "smallest counterexamples of another size", 2, wrong, 0, note)
