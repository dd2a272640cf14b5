"""How many entries each layer gets when the same number is shared out unevenly: what profiles of heads replaced."""

from collections.abc import Sequence
from typing import Any

from kvcluster.evaluation.quality.methods import DISTINCTIVE, body_ratio
from kvcluster.fast import Distinctive
from kvcluster.fast.huggingface import ClusteredCache
from kvcluster.fast.scalars import check_integer, check_keep_ratio

__all__ = ["READING_LAYERS", "distinctive_layers", "layer_ratios"]

# Of SmolLM2-135M, the layers in which answers find what they ask for, the most important first. From a search by the
# rule in reading_layers.py, on other texts; on its own that finds layer 15 instead of 14, and does as well.
READING_LAYERS = (18, 7, 20, 17, 23, 21, 14, 8, 6)
MOST_LAYERS = 10_000  # of a model


def layer_ratios(
    reading_layers: Sequence[int],
    *,
    n_layers: int,
    keep_ratio: float,
    chunk_size: int = 256,
    n_least: int = 5,
    n_middle: int = 64,
) -> list[float]:
    """A `keep_ratio` for each layer, at most `keep_ratio` on average, most of it for the layers that read from afar.

    Parameters
    ----------
    reading_layers : indices of the layers in which answers find what they ask for, the most important first. Few do;
        `benchmarks/ablation/reading_layers.py` finds those of a model.
    n_layers : layers of the model.
    keep_ratio : entries / tokens of what is clustered, the mean over the layers, in (0, 1].
    chunk_size : as the cache has it.
    n_least : entries of a chunk in each other layer, unless there are enough for more.
    n_middle : as many of the first reading layers stay whole as possible, while each of the other reading layers gets
        this many entries of a chunk.

    Raises
    ------
    ValueError : a number out of range; a layer that the model does not have, or one given twice; too small a ratio
        for `n_least` entries in each layer.

    Notes
    -----
    If all reading layers stay whole, the others share what is left. Our choice; see benchmarks/quality/QUALITY.md.

    Examples
    --------
    Eight layers, 20 entries of a chunk of 10 tokens for all of them. Layer 3 stays whole, layer 5 gets what is left:

    >>> ratios = layer_ratios([3, 5], n_layers=8, keep_ratio=0.25, chunk_size=10, n_least=1, n_middle=2)
    >>> [round(10 * ratio + 0.5) for ratio in ratios]
    [1, 1, 1, 10, 1, 4, 1, 1]
    """
    keep_ratio = check_keep_ratio(keep_ratio)
    n_layers = check_integer("n_layers", n_layers, least=1, most=MOST_LAYERS)
    chunk_size, n_least = check_integer("chunk_size", chunk_size, least=1), check_integer("n_least", n_least, least=1)
    n_middle = check_integer("n_middle", n_middle, least=n_least)
    if len(set(reading_layers)) < len(reading_layers) or not set(reading_layers) <= set(range(n_layers)):
        raise ValueError(
            f"reading_layers must be different layers from 0 to {n_layers - 1}, got {list(reading_layers)}"
        )
    entries = int(keep_ratio * chunk_size * n_layers)  # of a chunk in all layers
    if entries < n_least * n_layers:
        raise ValueError(
            f"keep_ratio * chunk_size must be at least n_least, got {keep_ratio} * {chunk_size} < {n_least}"
        )
    reading, others = len(reading_layers), n_layers - len(reading_layers)
    n_left = entries - n_least * others
    if n_left >= chunk_size * reading:
        shared = (entries - chunk_size * reading) // others if others else chunk_size
        entries_of_layer = dict.fromkeys(range(n_layers), min(chunk_size, shared))
        entries_of_layer |= dict.fromkeys(reading_layers, chunk_size)
    else:
        n_whole = max(0, *(n for n in range(reading) if n_left - chunk_size * n >= n_middle * (reading - n)), 0)
        middle = min(chunk_size, (n_left - chunk_size * n_whole) // (reading - n_whole))
        entries_of_layer = dict.fromkeys(range(n_layers), n_least)
        entries_of_layer |= dict.fromkeys(reading_layers[:n_whole], chunk_size)
        entries_of_layer |= dict.fromkeys(reading_layers[n_whole:], middle)
    # half an entry less than n / chunk_size: whatever the rounding, `ceil(ratio * chunk_size)` is n
    entries_in_order = (entries_of_layer[layer] for layer in range(n_layers))
    return [1.0 if n == chunk_size else (n - 0.5) / chunk_size for n in entries_in_order]


def distinctive_layers(model: Any, keep: float, n_tokens: int) -> ClusteredCache:
    """A cache of SmolLM2 whose reading layers keep most, `keep` of `n_tokens` in all."""
    ratios = layer_ratios(
        READING_LAYERS, n_layers=model.config.num_hidden_layers, keep_ratio=body_ratio(keep, n_tokens)
    )
    return ClusteredCache.for_model(model, keep_ratio=ratios, method=Distinctive(), **DISTINCTIVE)
