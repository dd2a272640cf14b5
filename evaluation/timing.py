"""Fair timings on a noisy machine: contenders run in turn, and what is reported is the ratio within each turn."""

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

__all__ = ["Ratios", "fitted_exponent", "ratios", "seconds_in_turn"]


@dataclass(frozen=True)
class Ratios:
    """Median, smallest and largest of the pairwise ratios, one a turn."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


def seconds_in_turn(
    contenders: Mapping[str, Callable[[], object]], rounds: int, after_each: Callable[[], object] = lambda: None
) -> dict[str, list[float]]:
    """Wall-clock seconds of each contender in each of `rounds` turns (A B C, A B C, ...), after one turn to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            if turn > 0:
                seconds[name].append(time.perf_counter() - start)
            after_each()
    return seconds


def ratios(ours: list[float], theirs: list[float]) -> Ratios:
    """Of `ours` to `theirs`, turn by turn."""
    each = [a / b for a, b in zip(ours, theirs, strict=True)]
    return Ratios(statistics.median(each), min(each), max(each))


def fitted_exponent(sizes: list[int], seconds: list[float]) -> float:
    """Slope of the least-squares line through (log size, log seconds).

    >>> round(fitted_exponent([1, 2, 4], [3.0, 12.0, 48.0]), 6)
    2.0
    """
    x, y = [math.log(size) for size in sizes], [math.log(second) for second in seconds]
    x_mean, y_mean = statistics.fmean(x), statistics.fmean(y)
    covariance = sum((a - x_mean) * (b - y_mean) for a, b in zip(x, y, strict=True))
    return covariance / sum((a - x_mean) ** 2 for a in x)
