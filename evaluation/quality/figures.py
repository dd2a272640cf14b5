"""Figures of the evaluation's results."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from ..colours import BLACK, BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILION
from ..places import writing
from .methods import METHODS

__all__ = ["bar_lengths", "draw_attention_errors", "draw_frontier", "draw_heat_map", "save"]

COLOURS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK)
MARKERS = "osD^vPX"
MOST_DEPTHS = 10


def draw_heat_map(path: Path, results: list[dict[str, Any]], title: str) -> None:
    """Token accuracy by depth and length of context, for the runs of one method; in brackets: needles per cell."""
    needles = [(result["n_tokens"], needle) for result in results for needle in result.get("needles", [])]
    lengths = sorted({length for length, _ in needles})
    n_depths = min(MOST_DEPTHS, max(len(result["needles"]) for result in results if "needles" in result))
    right, n_tokens, n_needles = np.zeros((3, n_depths, len(lengths)))
    for length, needle in needles:
        cell = int(needle["depth"] * n_depths), lengths.index(length)
        right[cell] += sum(needle["is_right"])
        n_tokens[cell] += len(needle["is_right"])
        n_needles[cell] += 1
    figure, axis = plt.subplots(figsize=(2.5 + 1.1 * len(lengths), 1.5 + 0.42 * n_depths), layout="constrained")
    with np.errstate(invalid="ignore"):
        image = axis.imshow(right / n_tokens, cmap="cividis", vmin=0, vmax=1, aspect="auto")
    for depth, column in np.ndindex(right.shape):
        if n_tokens[depth, column]:
            share = right[depth, column] / n_tokens[depth, column]
            label = f"{share:.2f}\n({n_needles[depth, column]:.0f})"
            axis.text(
                column, depth, label, ha="center", va="center", fontsize=7, color="black" if share > 0.5 else "white"
            )
    axis.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    axis.set_yticks(range(n_depths), [f"{100 * (i + 0.5) / n_depths:.0f} %" for i in range(n_depths)])
    axis.set(xlabel="tokens of context", ylabel="depth of the needle", title=title)
    figure.colorbar(image, label="token accuracy")
    save(figure, path)


def draw_frontier(path: Path, summaries: list[dict[str, Any]], title: str) -> None:
    """Token accuracy of needles against perplexity over the full cache's: a line per method, a point per share kept."""
    figure, axis = plt.subplots(figsize=(7, 5), layout="constrained")
    for place, method in enumerate(dict.fromkeys(summary["method"] for summary in summaries)):
        shown = [summary for summary in summaries if summary["method"] == method and has_both(summary)]
        shown.sort(key=lambda summary: summary["keep"])
        x = [summary["perplexity"]["of_full"]["value"] for summary in shown]
        y = [summary["needles"]["token_accuracy"]["value"] for summary in shown]
        bars = [bar_lengths(summary["needles"]["token_accuracy"]) for summary in shown]
        colour, marker = COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]
        if shown:
            axis.errorbar(
                x,
                y,
                yerr=np.array(bars).T,
                label=method + " (stores all)" * METHODS[method].stores_all,
                capsize=3,
                color=colour,
                marker=marker,
            )
        for summary, point in zip(shown, zip(x, y, strict=True), strict=True):
            axis.annotate(
                f"{summary['keep']:g}" if METHODS[method].has_keep else "all", point, (6, 6), textcoords="offset points"
            )
    axis.set(
        xlabel="perplexity of what follows / that of the full cache", ylabel="token accuracy of needles", title=title
    )
    axis.set_ylim(-0.02, 1.05)
    axis.invert_xaxis()  # better is up and to the right
    axis.grid(alpha=0.3)
    axis.legend(title="numbers: share of entries kept")
    save(figure, path)


def has_both(summary: dict[str, Any]) -> bool:
    return "needles" in summary and summary.get("perplexity", {}).get("of_full", {}).get("value") is not None


def bar_lengths(estimate: dict[str, Any]) -> tuple[float, float]:
    """Lengths of the interval below and above the value; 0 without an interval."""
    if estimate["low"] is None:
        return 0.0, 0.0
    return max(0.0, estimate["value"] - estimate["low"]), max(0.0, estimate["high"] - estimate["value"])


def draw_attention_errors(path: Path, summaries: list[dict[str, Any]], title: str) -> None:
    """Relative error of the attention output of each layer, one line for each method and share kept."""
    figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    shown = [summary for summary in summaries if "attention_errors" in summary and summary["method"] != "full"]
    methods = list(dict.fromkeys(summary["method"] for summary in shown))
    for summary in shown:
        style = ("-", "--", ":", "-.")[
            [s["keep"] for s in shown if s["method"] == summary["method"]].index(summary["keep"]) % 4
        ]
        colour = COLOURS[methods.index(summary["method"]) % len(COLOURS)]
        axis.plot(summary["attention_errors"], style, color=colour, label=f"{summary['method']} {summary['keep']:g}")
    axis.set(xlabel="layer", ylabel="|output - true| / |true|", title=title)
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.legend(title="method, share kept")
    save(figure, path)


def save(figure: Any, path: Path, dpi: int = 110) -> None:
    with writing(path):
        figure.savefig(path, dpi=dpi)
    plt.close(figure)
