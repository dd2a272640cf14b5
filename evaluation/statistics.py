"""What numbers say and how sure that is.

Needles of one context are not independent of each other. So 95 % intervals come from resampling whole contexts, each
with all its sums: percentiles of 10,000 bootstrap samples; none with fewer than two contexts. Shares of needles or
prompts that are entirely right also have Wilson's interval, which takes them to be independent. Times are compared
within turns.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = [
    "Ratios",
    "estimate",
    "exp_ratio_of_sums",
    "fitted_exponent",
    "proportion",
    "ratio_of_sums",
    "ratios",
    "wilson",
]

N_SAMPLES = 10_000
Z = 1.959963984540054  # 97.5 % of a normal variable lies below
Statistic = Callable[[np.ndarray, np.ndarray], np.ndarray]


def wilson(n_right: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion."""
    centre, spread = n_right + Z**2 / 2, Z * math.sqrt(n_right * (n - n_right) / n + Z**2 / 4)
    return max(0.0, (centre - spread) / (n + Z**2)), min(1.0, (centre + spread) / (n + Z**2))


def proportion(n_right: int, n: int) -> dict[str, Any]:
    """A share with Wilson's interval."""
    low, high = wilson(n_right, n)
    return {"value": n_right / n, "low": low, "high": high}


def ratio_of_sums(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return above.sum(axis=-1) / below.sum(axis=-1)


def exp_ratio_of_sums(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return np.exp(ratio_of_sums(above, below))


def estimate(above: Sequence[float], below: Sequence[float], statistic: Statistic = ratio_of_sums) -> dict[str, Any]:
    """A statistic of one pair of numbers for each context, and its interval from resampling contexts.

    Two contexts of four tokens each, all right and half right; two draws may both take the same one:

    >>> estimate([4, 2], [4, 4])
    {'value': 0.75, 'low': 0.5, 'high': 1.0}
    """
    pair = np.array(above, dtype=np.float64), np.array(below, dtype=np.float64)
    if not pair[1].sum():
        return {"value": None, "low": None, "high": None}
    value = float(statistic(*pair))
    if len(above) < 2:
        return {"value": value, "low": None, "high": None}
    chosen = np.random.default_rng(0).integers(len(above), size=(N_SAMPLES, len(above)))
    below_sampled = pair[1][chosen]
    has_any = below_sampled.sum(axis=-1) > 0
    samples = statistic(pair[0][chosen][has_any], below_sampled[has_any])
    low, high = np.quantile(samples, (0.025, 0.975))
    return {"value": value, "low": float(low), "high": float(high)}


@dataclass(frozen=True)
class Ratios:
    """Median, smallest and largest of the ratios, one per turn."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> Ratios:
    """Ratios of `ours` to `theirs`, turn by turn.

    >>> print(ratios([2.0, 3.0, 8.0], [1.0, 2.0, 2.0]))
    2.00 (1.50 to 4.00)
    """
    by_turn = [a / b for a, b in zip(ours, theirs, strict=True)]
    return Ratios(statistics.median(by_turn), min(by_turn), max(by_turn))


def fitted_exponent(sizes: list[int], seconds: list[float]) -> float:
    """Slope of the least-squares line through (log size, log seconds).

    >>> round(fitted_exponent([1, 2, 4], [3.0, 12.0, 48.0]), 6)
    2.0
    """
    x, y = [math.log(size) for size in sizes], [math.log(second) for second in seconds]
    x_mean, y_mean = statistics.fmean(x), statistics.fmean(y)
    covariance = sum((a - x_mean) * (b - y_mean) for a, b in zip(x, y, strict=True))
    return covariance / sum((a - x_mean) ** 2 for a in x)
