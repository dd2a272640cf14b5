"""Figures of the benchmark's results."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from ..colours import BLUE, GREY, SKY, VERMILION
from ..places import writing

__all__ = ["draw_decoding", "draw_serving"]

COLOURS = {"transformers": GREY, "full": VERMILION, "clustered 0.25": SKY, "clustered 0.2": BLUE}
NAMES = {
    "transformers": "transformers, full cache",
    "full": "kvcluster, full cache",
    "clustered 0.25": "kvcluster, a quarter kept",
    "clustered 0.2": "kvcluster, a fifth kept",
}


def draw_decoding(path: Path, runs: list[dict[str, Any]]) -> None:
    """Time per step against context length, one panel per batch size; dashed: reading the bytes alone."""
    batches = sorted({run["batch"] for run in runs})
    figure, axes = plt.subplots(1, len(batches), figsize=(6 * len(batches), 5), layout="constrained", squeeze=False)
    for axis, batch in zip(axes[0], batches, strict=True):
        chosen = sorted((run for run in runs if run["batch"] == batch), key=lambda run: run["context"])
        contexts = [run["context"] for run in chosen]
        for name, colour in COLOURS.items():
            times = [1e3 * np.median(run["seconds"][name]) for run in chosen]
            axis.plot(contexts, times, "o-", color=colour, label=NAMES[name])
            limits = [1e3 * run["limits"][name] for run in chosen]
            if name != "transformers":
                axis.plot(contexts, limits, "--", color=colour, linewidth=1)
        axis.set(xscale="log", yscale="log", xlabel="tokens of context", title=f"{batch} sequence{'s' * (batch > 1)}")
        axis.set_xticks(contexts, [f"{context:,}" for context in contexts])
        axis.minorticks_off()
        ticks = [tick for tick in (10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000) if in_range(axis, tick)]
        axis.set_yticks(ticks, [f"{tick:,}" for tick in ticks])
    axes[0, 0].set_ylabel("milliseconds per generated token")
    axes[0, 0].legend(title="dashed: reading the bytes, nothing else")
    figure.suptitle("SmolLM2-135M on this CPU: a smaller cache decodes faster")
    with writing(path):
        figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_serving(path: Path, runs: list[dict[str, Any]], context: int) -> None:
    """Tokens per second against memory for keys and values; the number of sequences beside each point."""
    figure, axis = plt.subplots(figsize=(7, 5), layout="constrained")
    budgets = [run["budget"] / 2**20 for run in runs]
    for name in runs[0]["at_once"]:
        rates = [np.median(run["tokens_per_second"][name]) for run in runs]
        axis.plot(budgets, rates, "o-", color=COLOURS[name], label=NAMES[name])
        for run, budget, rate in zip(runs, budgets, rates, strict=True):
            label = f"{run['at_once'][name]} sequences"
            axis.annotate(label, (budget, rate), (0, 9), textcoords="offset points", ha="center")
    axis.set(
        xlabel="memory for keys and values, MiB",
        ylabel="generated tokens per second",
        title=f"Sequences of {context:,} tokens, as many at once as fit",
    )
    axis.margins(x=0.15)
    axis.set_ylim(0, 1.15 * axis.get_ylim()[1])
    axis.legend()
    with writing(path):
        figure.savefig(path, dpi=110)
    plt.close(figure)


def in_range(axis: Axes, tick: float) -> bool:
    low, high = axis.get_ylim()
    return low <= tick <= high
