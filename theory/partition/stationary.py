"""Checks of the claims P4 and P5 of README.md: keys from a stationary process."""

import itertools
import math
from collections.abc import Callable

import numpy as np
from scipy.special import gammaln, hyp2f1

from kvcluster.reference import alternating_partition

from ..claims import Check

__all__ = ["autoregressive_keys", "check_expected_cosine", "check_expected_partition"]

SURE = 1e-9  # how likely a check of a true claim may fail
Partition = Callable[[int], tuple[np.ndarray, np.ndarray]]


def autoregressive_keys(rng: np.random.Generator, shape: tuple[int, ...], correlation: float) -> np.ndarray:
    """Keys (..., tokens, dim) whose features are independent and have `correlation ** distance` along the tokens."""
    keys = rng.standard_normal(shape)
    for token in range(1, shape[-2]):
        keys[..., token, :] *= math.sqrt(1 - correlation**2)
        keys[..., token, :] += correlation * keys[..., token - 1, :]
    return keys


def cosines(keys: np.ndarray) -> np.ndarray:
    """Of all pairs, (..., tokens, tokens)."""
    unit = keys / np.linalg.norm(keys, axis=-1, keepdims=True)
    return unit @ np.swapaxes(unit, -1, -2)


def expected_cosine(correlation: float, dim: int) -> float:
    """Of two keys whose features have this correlation: Hotelling's mean of a sample correlation."""
    ratio = math.exp(2 * (gammaln((dim + 1) / 2) - gammaln(dim / 2)))
    return float(2 / dim * ratio * correlation * hyp2f1(0.5, 0.5, dim / 2 + 1, correlation**2))


def deviation(samples: np.ndarray, width: float, tries: int) -> np.ndarray:
    """How far the mean over the first axis may be from the expectation, with probability 1 - SURE for all `tries`.

    Maurer and Pontil's empirical Bernstein inequality (arXiv:0907.3740v1, theorem 4), for numbers within an interval of
    that width, on both sides.
    """
    logarithm = math.log(4 * tries / SURE)
    variance = samples.var(axis=0, ddof=1)
    return np.sqrt(2 * variance * logarithm / len(samples)) + 7 * width * logarithm / (3 * (len(samples) - 1))


def check_expected_cosine(expected: Callable[[float, int], float] = expected_cosine) -> Check:
    """P4: means of simulated cosines, in units of what chance allows; and whether expectations fall with distance."""
    rng = np.random.default_rng(4)
    settings = list(itertools.product((0.3, 0.8, 0.97), (1, 2, 5, 64)))
    gaps = (1, 2, 5)
    worst, rises = 0.0, 0
    for correlation, dim in settings:
        similarities = cosines(autoregressive_keys(rng, (20_000, max(gaps) + 1, dim), correlation))[:, 0, gaps]
        expectations = np.array([expected(correlation**gap, dim) for gap in gaps])
        allowed = deviation(similarities, 2, len(settings) * len(gaps))
        worst = max(worst, float((np.abs(similarities.mean(axis=0) - expectations) / allowed).max()))
        rises += int((np.diff([expected(correlation**gap, dim) for gap in range(1, 64)]) > 0).sum())
    example = expected(0.8, 64)
    note = f"neighbours of correlation 0.8 with dim 64 have an expected cosine of {example:.4f}"
    return Check("P4", "|mean - expectation| / allowed", len(settings) * len(gaps), worst if not rises else 99, 1, note)


def check_expected_partition(partition: Partition = alternating_partition) -> Check:
    """P5: the partition beside all others of 8 tokens into halves, on the same 100,000 chunks of each process.

    Measured is what another partition is better by, at least, in the mean.
    """
    rng = np.random.default_rng(5)
    tokens, settings = 8, [(0.5, 8), (0.8, 16)]
    halves = [np.array(sources) for sources in itertools.combinations(range(tokens), tokens // 2)]
    ours = next(i for i, half in enumerate(halves) if np.array_equal(half, partition(tokens)[0]))
    mirror = next(i for i, half in enumerate(halves) if np.array_equal(half, tokens - 1 - halves[ours][::-1]))
    worst, notes = -math.inf, []
    for correlation, dim in settings:
        similarity = cosines(autoregressive_keys(rng, (100_000, tokens, dim), correlation))
        values = np.stack([best_matches(similarity, half) for half in halves], axis=-1)  # (chunks, halves)
        # Reversing time changes nothing of the process: our partition and its mirror have the same expectation.
        our_values = (values[:, ours] + values[:, mirror]) / 2
        others = np.delete(values, (ours, mirror), axis=1) - our_values[:, None]
        allowed = deviation(others, 2 * tokens, len(settings) * others.shape[1])
        worst = max(worst, float((others.mean(axis=0) + allowed).max()))
        pairs = next(i for i, half in enumerate(halves) if half.tolist() == [0, 3, 4, 7])
        gain = (values[:, ours].mean() - values[:, pairs].mean()) / (tokens // 2 - 1)
        notes.append(f"{gain:.4f} (predicted {neighbour_gain(correlation, dim):.4f})")
    note = f"gain over ABBA per source between two destinations: {', '.join(notes)}"
    return Check("P5", "another partition's lead, at most", len(settings) * len(halves), worst, 0, note)


def best_matches(similarity: np.ndarray, sources: np.ndarray) -> np.ndarray:
    """Summed best-match similarity of each chunk, (chunks,)."""
    destinations = np.setdiff1d(np.arange(similarity.shape[-1]), sources)
    return similarity[:, sources][:, :, destinations].max(axis=-1).sum(axis=-1)


def neighbour_gain(correlation: float, dim: int) -> float:
    """What a second neighbour adds to the expected best match, to first order in 1 / sqrt(dim)."""
    return (1 - correlation**2) * math.sqrt((1 - correlation**2 / 2) / (math.pi * dim))
