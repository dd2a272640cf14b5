"""The frontier of bytes: needles and perplexity of what takes few of them."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kvcluster.evaluation.colours import BLACK, BLUE, GREEN, GREY, ORANGE, VERMILION

__all__ = ["draw"]

GROUPS = {
    "clusters and bits (ours)": ("o", BLUE),
    "bits alone (ours)": ("s", GREEN),
    "clusters alone (ours)": ("^", ORANGE),
    "bits alone, by others": ("x", VERMILION),
    "kvpress and 4 bits": ("+", BLACK),
}
PERPLEXITIES = 0.98, 1.36  # that are shown


def draw(path: Path, found: dict[str, list[dict[str, Any]]]) -> None:
    """A row of two plots for each model: bytes against needles, bytes against perplexity."""
    figure = Figure(figsize=(11, 3.8 * len(found)), layout="constrained")
    for row, (name, summaries) in zip(figure.subplots(len(found), 2, squeeze=False), found.items(), strict=True):
        draw_part(row[0], summaries, "needles", f"{name}: answers that survive")
        draw_part(row[1], summaries, "perplexity", f"{name}: how well the text goes on")
        row[0].set_ylabel("needle tokens right, over the full cache's")
        row[1].set_ylabel("perplexity over the full cache's; less is better")
    figure.savefig(path, dpi=150)


def draw_part(axes: Axes, summaries: list[dict[str, Any]], part: str, title: str) -> None:
    for label, (marker, colour) in GROUPS.items():
        points = sorted(
            (each["of_bfloat16"], each[part]["of_full"]["value"]) for each in summaries if group_of(each) == label
        )
        if points:
            axes.plot(*zip(*points, strict=True), marker, color=colour, label=label)
    axes.axhline(1, color=GREY, linewidth=0.8, linestyle="dashed")
    axes.set_xscale("log")
    ticks = [0.05, 0.08, 0.12, 0.2, 0.3, 0.5]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("bytes of the cache, over all tokens in bfloat16")
    if part == "perplexity":
        axes.set_ylim(*PERPLEXITIES)
    axes.set_title(title)
    axes.legend(fontsize=8)


def group_of(summary: dict[str, Any]) -> str | None:
    """The group of a summary; None for other layouts."""
    method, is_all = summary["method"], summary["keep"] == 1.0
    if method.startswith(("quanto", "hqq", "turboquant")):
        return "bits alone, by others"
    if method.startswith("kvpress"):
        return "kvpress and 4 bits"
    if not method.startswith("bits-"):
        return None
    if method == "bits-16":
        return "clusters alone (ours)"
    return "bits alone (ours)" if is_all else "clusters and bits (ours)"
