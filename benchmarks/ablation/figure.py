"""The ablation, drawn: a panel for each ingredient, a row for each of its variants."""

import math
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.ablation.variants import PANELS, Settings, describe
from kvcluster.evaluation.colours import BLACK, BLUE, GREEN, VERMILION
from kvcluster.evaluation.quality.figures import bar_lengths, save

__all__ = ["draw"]

COLOURS, MARKERS = (BLUE, VERMILION, GREEN), "oDs"
N_COLUMNS = 2
Results = dict[tuple[str, float], dict[str, Any]]  # by variant and share kept


def draw(path: Path, results: Results, keeps: list[float]) -> None:
    """Token accuracy with intervals, a colour for each share kept; at the right perplexity over the full cache's."""
    columns = split(list(PANELS), N_COLUMNS)
    most = max(sum(len(PANELS[panel]) + 2 for panel in column) for column in columns)
    figure = plt.figure(figsize=(14, 1.6 + 0.27 * most), layout="constrained")
    full = results["full", 1.0]["accuracy"]["value"]
    for column, part in zip(figure.subfigures(1, N_COLUMNS, wspace=0.03), columns, strict=True):
        heights = [len(PANELS[panel]) for panel in part]
        axes = column.subplots(len(part), 1, sharex=True, height_ratios=heights, squeeze=False)[:, 0]
        for axis, panel in zip(axes, part, strict=True):
            draw_panel(axis, panel, results, keeps)
            axis.axvline(full, color=BLACK, linestyle=":", linewidth=1)
        left = max(0, math.floor(10 * axes[0].get_xlim()[0]) / 10)
        axes[0].set_xlim(left, 1.0)
        axes[0].text(1.01, -0.7, "perplexity", transform=axes[0].get_yaxis_transform(), fontsize=9)
        axes[-1].set_xlabel(f"token accuracy of answers, from {left:g} (dotted: full cache)")
    dots = [
        plt.Line2D([], [], color=colour, marker=marker, label=f"{100 * keep:g} % of all entries kept")
        for keep, colour, marker in zip(keeps, COLOURS, MARKERS, strict=False)
    ]
    figure.legend(handles=dots, loc="outside lower center", ncols=len(dots), frameon=False)
    figure.suptitle(
        "One ingredient of distinctive matching changed at a time; bold: what is shipped. Bars: 95 % intervals over "
        "contexts.\nPerplexity of the text that follows, over the full cache's. The columns' axes differ.",
        fontsize=11,
    )
    save(figure, path, dpi=100)


def split(panels: list[str], n_columns: int) -> list[list[str]]:
    """Columns of about as many rows each, in order."""
    sizes = [len(PANELS[panel]) + 2 for panel in panels]
    columns: list[list[str]] = [[] for _ in range(n_columns)]
    for number, panel in enumerate(panels):
        middle = sum(sizes[:number]) + sizes[number] / 2
        columns[min(n_columns - 1, int(middle * n_columns / sum(sizes)))].append(panel)
    return columns


def draw_panel(axis: plt.Axes, panel: str, results: Results, keeps: list[float]) -> None:
    variants = PANELS[panel]
    for row, settings in enumerate(variants.values()):
        for place, keep in enumerate(keeps):
            result = results.get((describe(settings), keep))
            if result is None:
                continue
            accuracy, height = result["accuracy"], row + 0.26 * (place - (len(keeps) - 1) / 2)
            below, above = bar_lengths(accuracy)
            ends = [accuracy["value"] - below, accuracy["value"] + above]
            axis.plot(ends, [height, height], color=COLOURS[place], linewidth=1.6)
            axis.plot(accuracy["value"], height, MARKERS[place], color=COLOURS[place], markersize=5)
            if result["perplexity"]:
                look = {"transform": axis.get_yaxis_transform(), "va": "center", "fontsize": 8}
                axis.text(
                    1.01 + 0.11 * place, row, f"{result['perplexity']['value']:.3f}", color=COLOURS[place], **look
                )
    axis.set_yticks(range(len(variants)), list(variants), fontsize=9)
    for label, settings in zip(axis.get_yticklabels(), variants.values(), strict=True):
        label.set_fontweight("bold" if settings == Settings() else "normal")
    axis.set_ylim(len(variants) - 0.5, -0.5)
    axis.set_title(panel, loc="left", fontsize=10, fontstyle="italic")
    axis.grid(axis="x", alpha=0.3)
