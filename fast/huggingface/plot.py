"""A picture of the clusters of a cache of a whole model."""

from typing import TYPE_CHECKING, Any

import torch

from ..recall_cache import RecallCache

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_cache"]


def plot_cache(cache: Any, row: int = 0) -> "Figure":
    """Cluster sizes along the sequence, a line of pixels for each layer and KV head of one batch row.

    A pixel is a chunk (of a `RecallCache`: a segment); its colour says how many tokens its largest cluster has.

    Raises
    ------
    ValueError : nothing is clustered yet, or a batch row that is none.
    """
    from matplotlib.figure import Figure

    lines, labels, width = [], [], 1
    for index, layer in enumerate(cache.layers):
        entries = getattr(layer, "entries", None)
        if entries is None or not entries.n_clustered:
            continue
        sizes, per_pixel, width = sizes_of(entries)
        if not 0 <= row < len(sizes):
            raise ValueError(f"row must be from 0 to {len(sizes) - 1}, got {row}")
        for head, of_head in enumerate(sizes[row]):
            lines.append(torch.stack([part.max() for part in of_head.split(per_pixel)]))
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
    return any(isinstance(getattr(layer, "entries", None), RecallCache) for layer in cache.layers)


def sizes_of(entries: Any) -> tuple[torch.Tensor, int, int]:
    """Sizes (batch, kv_heads, clusters) in the order of the sequence; clusters and tokens of a pixel."""
    if isinstance(entries, RecallCache):
        size = int(entries.plan.prompt_segment_size or entries.plan.segment_size or 1)
        made: Any = entries.clusters  # not None: something is clustered
        return made.counts, entries.plan.n_clusters(size), size
    target = max(1, round(entries.n_body / (entries.n_clustered // entries.chunk_size)))
    body = entries.counts[..., entries.n_sink : entries.n_sink + entries.n_body]
    return body, target, entries.chunk_size
