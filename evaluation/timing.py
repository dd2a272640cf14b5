"""Fair timings on a noisy machine: contenders run in turn, so that all meet the same machine."""

import time
from collections.abc import Callable, Mapping

__all__ = ["seconds_in_turn"]


def seconds_in_turn(
    contenders: Mapping[str, Callable[[], object]],
    rounds: int,
    after_each: Callable[[], object] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds by `clock` of each contender in each of `rounds` turns (A B C, A B C, ...), after one turn to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name, run in contenders.items():
            start = clock()
            run()
            if turn > 0:
                seconds[name].append(clock() - start)
            after_each()
    return seconds
