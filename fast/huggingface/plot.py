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
        if not row_cache.n_clustered:
            continue
        sizes, per_span, spans, width = sizes_of(row_cache)
        for head, head_sizes in enumerate(sizes[place]):
            largest = torch.stack([part.max() for part in head_sizes.split(per_span)])
            lines.append(largest.repeat_interleave(torch.tensor(spans, device=largest.device)))
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


def sizes_of(cache: Any) -> tuple[torch.Tensor, int, tuple[int, ...], int]:
    """Cluster sizes (batch, kv_heads, clusters); clusters of a span; pixels of each span; tokens of a pixel."""
    if isinstance(cache, RecallCache):
        size = int(cache.settings.prompt_segment_size or cache.settings.segment_size or 1)
        clusters: Any = cache.clusters  # not None: something is clustered
        per_span = cache.settings.n_clusters(size)
        return clusters.counts, per_span, (1,) * -(-clusters.counts.shape[-1] // per_span), size
    body = cache.counts[..., cache.n_sink : cache.n_sink + cache.n_body]
    return body, cache.n_body // len(cache.spans), cache.spans, cache.chunk_size
