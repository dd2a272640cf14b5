"""The demo's figure: what was merged, how large the clusters are, what attention sees before and after."""

import itertools
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.ticker import MaxNLocator

from kvcluster.reference.attention import scaled_logits, softmax
from kvcluster.reference.clustered_attention import log_counts

from ..colours import BLUE, GREY, ORANGE
from ..places import check_file, writing
from .oracle import NextTokenAttention

__all__ = ["check_figure_path", "draw"]

N_SHOWN = 64  # tokens of a chunk, as many as can be read beside each other


def check_figure_path(path: Path) -> None:
    """Raise ValueError unless a figure can be saved as `path`."""
    if not path.parent.is_dir():
        raise ValueError(f"figure must lie in an existing folder, got {path}")
    if path.is_dir():
        raise ValueError(f"figure must be a file, got the folder {path}")
    suffixes = sorted(f".{name}" for name in FigureCanvasBase.get_supported_filetypes())
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"figure must end in one of {' '.join(suffixes)}, got {path}")
    check_file(path)


def draw(
    path: Path, clustered: Any, attention: NextTokenAttention, labels: dict[int, np.ndarray], words: list[str]
) -> None:
    """Save a figure about the layer and head whose next token attends most to tokens that were clustered.

    Parameters
    ----------
    path : where the figure goes; its suffix says the format.
    clustered : the clustered cache of the model; at least one chunk is clustered.
    attention : queries and keys of the next token.
    labels : by layer (kv_heads, body tokens), the entry of each token of the body.
    words : the text of each token of the context.
    """
    layers = list(labels)
    spans = {i: weights_by_span(clustered.layers[i].cache.caches[0], attention, i) for i in layers}
    on_body = np.array([before[:, 1:-1].sum(axis=-1) for before, _ in spans.values()])  # (layers, kv_heads)
    place, head = np.unravel_index(on_body.argmax(), on_body.shape)
    layer = layers[place]
    before, after = (weights[head] for weights in spans[layer])
    entries = clustered.layers[layer].cache.caches[0]

    figure, axes = plt.subplots(3, 1, figsize=(13, 11), height_ratios=[1.3, 1, 1], layout="constrained")
    figure.suptitle(
        f"What clustering did to layer {layer + 1} of {len(clustered.layers)}, "
        f"KV head {head + 1} of {len(labels[layer])} (the one whose next token looks most at old text)",
        fontsize=13,
    )
    draw_chunk(axes[0], entries, labels[layer][head], int(before[1:-1].argmax()), words)
    draw_sizes(axes[1], entries, entries.counts[0, head].numpy())
    draw_attention(axes[2], entries, before, after)
    with writing(path):
        figure.savefig(path, dpi=110)
    plt.close(figure)


def weights_by_span(entries: Any, attention: NextTokenAttention, layer: int) -> tuple[np.ndarray, np.ndarray]:
    """Attention of the next token to sinks, each chunk, and recent tokens, with the full and the clustered cache.

    Returns
    -------
    before, after : (kv_heads, 1 + chunks + 1), float64, for the same query; mean over the query heads of a KV head.
    """
    query, keys = attention.query_full[layer], attention.keys_full[layer]
    before = softmax(scaled_logits(query, keys, None)).mean(axis=1)  # (kv_heads, tokens + 1)
    stored = np.concatenate([entries.keys[0].numpy(), keys[:, -1:]], axis=1)
    counts = np.pad(entries.counts[0].numpy(), [(0, 0), (0, 1)], constant_values=1)
    after = softmax(scaled_logits(query, stored, None) + log_counts(counts)[:, None]).mean(axis=1)

    chunks = entries.n_clustered // entries.chunk_size
    kept = (entries.n_stored - entries.n_seen + entries.n_clustered) // chunks  # entries of a chunk
    starts_before = entries.n_sink + entries.chunk_size * np.arange(chunks + 1)
    starts_after = entries.n_sink + kept * np.arange(chunks + 1)
    return sum_spans(before, starts_before), sum_spans(after, starts_after)


def sum_spans(weights: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Sums over the last axis: up to the first of `starts`, from each start to the next, from the last to the end."""
    return np.add.reduceat(weights, np.concatenate([[0], starts]), axis=-1)


def draw_chunk(axis: Axes, entries: Any, labels: np.ndarray, chunk: int, words: list[str]) -> None:
    """Arcs between the first tokens of one chunk that share a centroid."""
    size = entries.chunk_size
    start, n_shown = entries.n_sink + chunk * size, min(size, N_SHOWN)
    chunk_labels = labels[chunk * size : (chunk + 1) * size]
    colours = matplotlib.colormaps["tab20"]
    n_shared = 0
    for label in np.unique(chunk_labels[:n_shown]):
        members = np.flatnonzero(chunk_labels[:n_shown] == label)
        shared = np.count_nonzero(chunk_labels == label) > 1
        colour = colours(n_shared % 20) if shared else GREY
        n_shared += int(shared)
        axis.plot(members, np.zeros(len(members)), "o", color=colour, markersize=6 if shared else 4)
        for left, right in itertools.pairwise(members):
            angle = np.linspace(0, np.pi, 30)
            radius = (right - left) / 2
            axis.plot((left + right) / 2 - radius * np.cos(angle), radius * np.sin(angle), color=colour, linewidth=1.5)
    axis.set_title(
        f"One chunk: {size} tokens became {len(np.unique(chunk_labels))} entries"
        f"{'' if n_shown == size else f'; its first {n_shown}'}. Arcs join tokens that now share one centroid; grey "
        "tokens stayed alone."
    )
    shown_words = [repr(word)[1:-1] for word in words[start : start + n_shown]]
    axis.set_xticks(range(n_shown), shown_words, rotation=90, fontsize=7, parse_math=False)
    axis.set_xlim(-1, n_shown)
    axis.set_yticks([])
    axis.set_xlabel(f"tokens of the text, positions {start:,} to {start + n_shown - 1:,}")
    axis.spines[["left", "right", "top"]].set_visible(False)


def draw_sizes(axis: Axes, entries: Any, counts: np.ndarray) -> None:
    """Tokens per entry, in the order in which the cache stores them."""
    for is_shown, colour, name in (
        (counts > 1, ORANGE, "centroids of several tokens"),
        (counts == 1, BLUE, "single tokens, kept exactly (sinks, recent, unmatched)"),
    ):
        (entry,) = np.nonzero(is_shown)
        axis.bar(entry, counts[entry], width=1.0, color=colour, label=f"{len(entry):,} {name}")
    axis.set_title(f"Cluster sizes: {entries.n_seen:,} tokens in {len(counts):,} entries")
    axis.set_xlabel("entry of the cache, oldest first")
    axis.set_ylabel("tokens in the entry")
    axis.set_xlim(-0.5, len(counts) - 0.5)
    axis.set_ylim(0, 1.3 * counts.max())  # room for the legend
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    axis.legend(loc="upper right")


def draw_attention(axis: Axes, entries: Any, before: np.ndarray, after: np.ndarray) -> None:
    """Attention weight of each chunk, before and after clustering."""
    chunks = len(before) - 2
    edges = entries.n_sink + entries.chunk_size * np.arange(chunks + 1)
    axis.stairs(before[1:-1], edges, color=GREY, fill=True, alpha=0.6, label="full cache")
    axis.stairs(after[1:-1], edges, color=ORANGE, linewidth=2, label="clustered cache, same query")
    axis.set_yscale("log")
    axis.set_title(
        "Attention of the next token to each chunk, before and after. "
        f"Outside the chunks: sinks {before[0]:.0%} then {after[0]:.0%}, recent {before[-1]:.0%} then {after[-1]:.0%}"
    )
    axis.set_xlabel("position in the text (tokens)")
    axis.set_ylabel("share of attention (log scale)")
    axis.set_xlim(0, entries.n_seen)
    axis.set_ylim(top=5 * max(before.max(), after.max()))  # room for the legend
    axis.legend(loc="upper left", ncols=2)
