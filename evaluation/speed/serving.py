"""Serving under a fixed memory for keys and values: as many sequences at once as fit, full against clustered."""

import statistics
from collections.abc import Callable
from typing import Any

import torch

from ..report import Claim, Line, Section
from ..statistics import ratios
from ..timing import seconds_in_turn
from .contenders import CONTENDERS, filled
from .decoding import step

__all__ = ["serving"]

SERVED = ("full", "clustered 0.25")
LEAST_SEQUENCES = 3.4  # times as many; 4 but for sinks, recent tokens and room to grow


@torch.inference_mode()
def serving(model: Any, context: int, budgets: tuple[int, ...], rounds: int, advance: Callable[[], object]) -> Section:
    """Generated tokens per second of sequences of `context` tokens, all in one batch, for each budget in bytes."""
    of_one = {name: filled(CONTENDERS[name](model), 1, context, model).nbytes_reserved for name in SERVED}
    lines: list[Line] = []
    numbers: list[dict[str, Any]] = []
    for budget in budgets:
        at_once = {name: budget // n_bytes for name, n_bytes in of_one.items()}
        runs: dict[str, Callable[[], object]] = {}
        for name, batch in at_once.items():
            cache = filled(CONTENDERS[name](model), batch, context, model)
            runs[name] = step(model, torch.ones(batch, 1, dtype=torch.long), cache)
        seconds = seconds_in_turn(runs, rounds, advance)
        rates = {name: [at_once[name] / second for second in seconds[name]] for name in SERVED}
        numbers.append({"budget": budget, "at_once": at_once, "tokens_per_second": rates})
        gain = ratios(rates[SERVED[1]], rates[SERVED[0]])
        for name in SERVED:
            cells = (f"{name}, {budget / 2**20:,.0f} MiB", str(at_once[name]), f"{statistics.median(rates[name]):.1f}")
            if name == SERVED[0]:
                lines.append(Line((*cells, "1")))
                continue
            times_as_many = at_once[name] / at_once[SERVED[0]]
            claim = Claim(
                f"sequences at once, {budget / 2**20:,.0f} MiB", times_as_many, LEAST_SEQUENCES, is_least=True
            )
            lines.append(Line((*cells, f"{gain}, {times_as_many:.2f} as many sequences"), claim))
    return Section(
        f"4. Serving sequences of {context:,} tokens under a fixed memory for keys and values",
        ("cache, memory", "sequences at once", "tokens per second", "this / full"),
        lines,
        "Memory: what the caches hold, room to grow included. Our attention for both.",
        {"runs": numbers},
    )
