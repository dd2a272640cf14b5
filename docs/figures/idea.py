"""Draw the idea, eight made-up keys clustered by the reference: `python docs/figures/idea.py [FILE]`."""

import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from kvcluster.reference import attention, chunked_soft_matching, clustered_attention, merge

ANGLES = (20, 30, 25, 28, 100, 110, 105, 190)  # degrees: where the keys point
QUERY = (0.15, 0.55)
COLOURS = ("#E69F00", "#56B4E9", "#009E73")  # Okabe and Ito: told apart with any colour vision
INK, GREY = "#222222", "#777777"
BOX = 0.84
FIRST_ENTRY = 9.4


def draw(path: Path) -> None:
    """Write the picture."""
    radians = np.deg2rad(ANGLES)
    keys = np.stack([2 * np.cos(radians), 2 * np.sin(radians)], axis=1).astype(np.float32)  # (tokens, 2)
    query = np.array([QUERY], dtype=np.float32)
    clustering = chunked_soft_matching(keys, keep_ratio=3 / 8, chunk_size=8)
    centroids = merge(keys, clustering)  # (entries, 2)
    of_tokens = attention(query, keys, np.eye(8, dtype=np.float32))[0]  # unit vectors as values give the weights
    identity = np.eye(len(centroids), dtype=np.float32)
    of_entries = clustered_attention(query, centroids, identity, clustering.counts)[0]
    without = attention(query, centroids, identity)[0]

    figure = plt.figure(figsize=(8.4, 4.4))
    left, right = figure.add_axes((0.005, 0.48, 0.99, 0.36)), figure.add_axes((0.165, 0.02, 0.825, 0.31))
    left.set(xlim=(-0.5, 11.9), ylim=(-1.2, 0.6), aspect="equal", anchor="W")
    left.axis("off")
    boxes(left, 0, keys, [COLOURS[label] for label in clustering.labels])
    boxes(left, FIRST_ENTRY, centroids, COLOURS)
    for entry, count in enumerate(clustering.counts):
        left.text(FIRST_ENTRY + entry, -0.85, f"x {count}", ha="center", va="center", fontsize=14, color=INK)
    left.annotate("", (8.8, 0), (7.7, 0), arrowprops={"arrowstyle": "-|>", "lw": 2.5, "color": GREY})
    title(figure, 0.008, 0.94, "1  A chunk of 8 tokens", "each has a key (arrow); neighbours' keys are alike")
    title(figure, 0.72, 0.94, "2  becomes 3 entries", "the mean key, and a count")
    title(figure, 0.008, 0.42, "3  that weigh what their tokens did", "share of a query's attention")
    colours_of_tokens = [COLOURS[label] for label in clustering.labels]
    bars = {
        "all 8 tokens": (of_tokens, colours_of_tokens),
        "3 entries,\n+ log count": (of_entries, COLOURS),
        "3 entries,\nno count": (without, COLOURS),
    }
    for row, (weights, colours) in enumerate(bars.values()):
        starts = 100 * (np.cumsum(weights) - weights)
        right.barh(-row, 100 * weights, left=starts, color=colours, edgecolor="white", linewidth=1.5, height=0.62)
    right.set_yticks([-row for row in range(len(bars))], list(bars), fontsize=11)
    right.set(xlim=(0, 100), xticks=[])
    right.spines[:].set_visible(False)
    right.tick_params(length=0)
    edges = 100 * np.cumsum(of_entries)[:-1]
    for edge in edges:
        right.plot([edge, edge], [-1.4, 0.4], color=INK, linewidth=1, linestyle=":")
    figure.savefig(path, dpi=130, facecolor="white")
    plt.close(figure)


def boxes(axis: Axes, first: float, keys: np.ndarray, colours: Sequence[str]) -> None:
    """A row of coloured boxes from the position `first` on, with a key's direction in each."""
    for index, (key, colour) in enumerate(zip(keys, colours, strict=True)):
        middle = np.array([first + index, 0])
        corner = middle - BOX / 2
        axis.add_patch(FancyBboxPatch(corner, BOX, BOX, boxstyle="round,pad=0,rounding_size=0.12", color=colour))
        half = 0.3 * key / np.linalg.norm(key)
        axis.annotate("", middle + half, middle - half, arrowprops={"arrowstyle": "->", "lw": 2, "color": INK})


def title(figure: Figure, left: float, bottom: float, words: str, explanation: str) -> None:
    figure.text(left, bottom, words, fontsize=14, fontweight="bold", color=INK)
    figure.text(left, bottom - 0.065, explanation, fontsize=11, color=GREY)


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("idea.png"))
