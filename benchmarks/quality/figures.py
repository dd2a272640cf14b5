"""The figures of the quality page."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from benchmarks.quality.results import Results, by_depth
from kvcluster.evaluation.colours import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION
from kvcluster.evaluation.quality.figures import save

__all__ = ["draw_depths", "draw_frontier"]

OUR_COLOURS, OUR_MARKERS = (BLUE, VERMILION, BLACK, PURPLE), "oDsh"
MOST_PERPLEXITY = 1.25  # drawn, over the full cache's
COLOURS, MARKERS = (GREEN, ORANGE, SKY, GREY), "^vP*X<>dp"  # no two alike, up to 36 presses


def draw_frontier(path: Path, results: Results, ours: list[str], title: str) -> None:
    """Needles' token accuracy against perplexity, both over the full cache's: a line per method, a point per share."""
    methods = list(dict.fromkeys(name for name, keep in results.runs if keep < 1))
    methods.sort(key=lambda name: (name not in ours, -highest_accuracy(results, name)))
    figure, axis = plt.subplots(figsize=(11, 6.5), layout="constrained")
    beyond = []  # marks of points that lie off the figure
    axis.plot([1], [1], marker="*", markersize=16, color=BLACK, linestyle="none", label="full cache")
    for name in methods:
        summaries = [results.summaries[name, keep] for keep in results.keeps if (name, keep) in results.summaries]
        x = [summary["perplexity"]["of_full"]["value"] for summary in summaries]
        y = [summary["needles"]["of_full"]["value"] for summary in summaries]
        place = ours.index(name) if name in ours else methods.index(name) - len(ours)
        look: dict[str, Any] = {"linestyle": "--", "linewidth": 1, "markersize": 6, "alpha": 0.8}
        colour, marker = COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]
        if name in ours:
            look = {"linewidth": 2.5, "markersize": 8, "zorder": 3}
            colour, marker = OUR_COLOURS[place % len(OUR_COLOURS)], OUR_MARKERS[place % len(OUR_MARKERS)]
        axis.plot(x, y, label=name, color=colour, marker=marker, **look)
        for summary, *point in zip(summaries, x, y, strict=True):
            if point[0] > MOST_PERPLEXITY:
                label = f"{name} {summary['keep']:g}: {point[0]:.2f}, {point[1]:.2f}"
                at = MOST_PERPLEXITY, height_at_border(x, y, point)
                beyond += axis.plot(*at, "<", label=label, color=colour, markersize=10, clip_on=False, zorder=4)
        if name in ours:
            for summary, point in zip(summaries, zip(x, y, strict=True), strict=True):
                axis.annotate(
                    f"{summary['keep']:g}", point, (7, 5), textcoords="offset points", fontsize=8, color=colour
                )
    axis.set(
        xlabel="perplexity of what follows / that of the full cache",
        ylabel="token accuracy of needles / that of the full cache",
        title=title,
    )
    axis.set_ylim(-0.02, 1.05)
    axis.set_xlim(right=min(axis.get_xlim()[1], MOST_PERPLEXITY))
    axis.invert_xaxis()  # better is up and to the right
    axis.grid(alpha=0.3)
    shares = ", ".join(f"{keep:g}" for keep in results.keeps)
    title = f"on each line: {shares} of entries kept,\nfrom the upper end"
    lines = [line for line in axis.get_lines() if line not in beyond]
    figure.legend(handles=lines, loc="outside right upper", fontsize=8, title=title)
    if beyond:
        title = "beyond the left border, where arrows point:\nperplexity, needles"
        figure.legend(handles=beyond, loc="outside right lower", fontsize=8, title=title)
        figure.set_figheight(max(6.5, 0.18 * len(lines + beyond) + 1.6))  # what the legends need
    save(figure, path, dpi=100)


def highest_accuracy(results: Results, name: str) -> float:
    return max(
        summary["needles"]["of_full"]["value"] for (method, _), summary in results.summaries.items() if method == name
    )


def height_at_border(x: list[float], y: list[float], point: list[float]) -> float:
    """Where the line of a method leaves the figure; the point's own height if all of it is outside."""
    inside = [pair for pair in zip(x, y, strict=True) if pair[0] <= MOST_PERPLEXITY]
    if not inside:
        return point[1]
    last = max(inside)
    return last[1] + (point[1] - last[1]) * (MOST_PERPLEXITY - last[0]) / (point[0] - last[0])


def draw_depths(path: Path, results: Results, ours: list[str], title: str) -> None:
    """Token accuracy of needles by depth: a panel per share kept, a row per method, ours first, then by score."""
    figure, axes = plt.subplots(
        1,
        len(results.keeps),
        figsize=(2.6 + 4.2 * len(results.keeps), 1.6 + 0.32 * max(len(results.methods(k)) for k in results.keeps)),
        layout="constrained",
        squeeze=False,
    )
    for axis, keep in zip(axes[0], results.keeps, strict=True):
        names = sorted(
            results.methods(keep),
            key=lambda name: (
                name not in ours,
                -results.summaries[name, keep]["needles"]["token_accuracy"]["value"],
            ),
        )
        rows = [("full", 1.0), *((name, keep) for name in names)]
        cells = np.array([[np.nan if x is None else x for x in by_depth(results.runs[pair])] for pair in rows])
        image = axis.imshow(cells, cmap="cividis", vmin=0, vmax=1, aspect="auto")
        for (row, column), share in np.ndenumerate(cells):
            if not np.isnan(share):
                colour = "black" if share > 0.5 else "white"
                axis.text(column, row, f"{share:.2f}", ha="center", va="center", fontsize=7, color=colour)
        n = cells.shape[1]
        axis.set_yticks(range(len(rows)), [name for name, _ in rows], fontsize=8)
        axis.set_xticks(range(n), [f"{100 * (i + 0.5) / n:.0f}" for i in range(n)], fontsize=8)
        axis.set(xlabel="depth of the needle (% of the context)", title=f"{keep:g} kept")
    figure.colorbar(image, ax=axes[0].tolist(), label="token accuracy")
    figure.suptitle(title)
    save(figure, path, dpi=100)
