"""A picture of the clusters of a cache of a whole model."""

from typing import TYPE_CHECKING, Any

import torch

from ..chelsea_cache import ChelseaCache
from ..recall_cache import RecallCache

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_cache"]


def plot_cache(cache: Any, row: int = 0) -> "Figure":
    """Cluster sizes along the sequence, a line of pixels for each layer and KV head of one batch row.

    A pixel is as many tokens as a chunk has (of a `RecallCache`: a segment); its colour says how many the largest
    cluster there has. Entries do not know their tokens, so each is shown as if its tokens followed one another: within
    a chunk (with a budget, a span) of a `ClusteredCache`, over a whole `ChelseaCache`. Heads that stay whole have
    clusters of one.

    Raises
    ------
    ValueError : nothing is clustered yet, or a batch row that does not exist.
    """
    from matplotlib.figure import Figure

    lines, labels, width = [], [], 1
    for index, layer in enumerate(cache.layers):
        if layer.is_sliding or not layer.cache.n_seen:
            continue
        if not 0 <= row < layer.cache.n_rows:
            raise ValueError(f"row must be from 0 to {layer.cache.n_rows - 1}, got {row}")
        row_cache, place = layer.cache.of_row(row)
        sizes = sizes_of_tokens(row_cache, place)
        if not sizes:
            continue
        width = pixel_width(row_cache)
        for head, of_head in enumerate(sizes):
            lines.append(torch.stack([part.max() for part in of_head.split(width)]))
            labels.append(f"{index}.{head}")
    if not lines:
        raise ValueError("plot needs something clustered, got a cache of exact tokens only")
    figure = Figure(figsize=(9, max(2.5, 0.12 * len(lines) + 1)), layout="constrained")
    axes = figure.subplots()
    image = torch.nn.utils.rnn.pad_sequence([line.float() for line in lines], batch_first=True, padding_value=torch.nan)
    shown_image = axes.imshow(image.numpy(), aspect="auto", interpolation="nearest", cmap="viridis", vmin=1)
    step = max(1, len(labels) // 20)
    axes.set_yticks(range(0, len(labels), step), labels[::step])
    axes.set_xlabel(f"position along the sequence (each pixel {width} tokens)")
    axes.set_ylabel("layer.KV head")
    axes.set_title("Tokens of the largest cluster")
    figure.colorbar(shown_image, label="tokens that share one entry" if not is_recall(cache) else "tokens of a cluster")
    return figure


def is_recall(cache: Any) -> bool:
    return any(isinstance(layer.cache.caches[0], RecallCache) for layer in cache.own_layers)


def pixel_width(cache: Any) -> int:
    """Tokens of a pixel."""
    if isinstance(cache, RecallCache):
        return int(cache.settings.prompt_segment_size or cache.settings.segment_size or 1)
    return int(cache.chunk_size)


def sizes_of_tokens(cache: Any, place: int) -> list[torch.Tensor]:
    """For each KV head, of each token between sinks and recent ones, the tokens that share its cluster.

    Without heads if nothing is clustered.
    """
    if isinstance(cache, RecallCache):
        clusters = cache.clusters
        return [] if clusters is None else list(clusters.counts[place].gather(-1, clusters.labels[place]).cpu())
    is_chelsea = isinstance(cache, ChelseaCache)
    if not (cache.n_stored < cache.n_seen if is_chelsea else cache.n_clustered):
        return []
    n_recent = cache.n_recent if is_chelsea else cache.n_seen - cache.n_sink - cache.n_clustered
    heads = [counts[counts > 0] for counts in cache.entries()[2][place].cpu()]  # shorter ones begin with zeros
    bodies = [counts[cache.n_sink : len(counts) - n_recent] for counts in heads]
    return [counts.repeat_interleave(counts) for counts in bodies]
