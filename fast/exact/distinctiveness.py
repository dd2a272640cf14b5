"""Distinctive matching after the likeness of each token to its chunk's mean is known: scores, and what they decide."""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from .chunks import CompressedChunks, count_members
from .entries import rows_of
from .mean import certified_mean, sums_are_exact
from .similarity import certified_matches

__all__ = [
    "Shape",
    "compress_by_scores",
    "distinctiveness",
    "evenly_spaced",
    "labels_of",
    "numbers_of_entries",
    "scores_by_likeness",
    "shape_of_layers",
    "split_by_score",
]

WINDOW = 7  # as in the reference
Shape = tuple[int, int, int, int]  # layers, heads that share their scores, chunks, tokens of a chunk


def shape_of_layers(keys: Float[Tensor, "*lead tokens dim"], chunk_size: int) -> Shape:
    """`Shape` of keys whose last leading axis is the heads of a layer; only these share their scores."""
    heads = keys.shape[-3] if keys.ndim > 2 else 1
    return keys.shape[:-3].numel(), heads, keys.shape[-2] // chunk_size, chunk_size


def numbers_of_entries(target: int, n_shared: int) -> tuple[int, int]:
    """Of the `target` entries of a chunk, how many are exact and how many are shared."""
    n_shared = max(1, min(n_shared, target // 2))
    return target - n_shared, n_shared


def scores_by_likeness(
    likeness_to_mean: Callable[[Tensor], Tensor],
    keys: Float[Tensor, "*lead tokens dim"],
    values: Float[Tensor, "*lead tokens dim_value"],
    chunk_size: int,
) -> Float64[Tensor, "layers chunks chunk"]:
    """Scores of the tokens of whole chunks by `likeness_to_mean`, of tokens (chunks, chunk, dim) to their mean."""
    shape = shape_of_layers(keys, chunk_size)
    in_chunks = (array.reshape(-1, chunk_size, array.shape[-1]) for array in (keys, values))
    return distinctiveness(*(likeness_to_mean(array).reshape(shape) for array in in_chunks))


def compress_by_scores(
    scores: Float64[Tensor, "layers chunks chunk"],
    keys: Float[Tensor, "*lead tokens dim"],
    values: Float[Tensor, "*lead tokens dim_value"],
    *,
    target: int,
    n_shared: int,
) -> CompressedChunks:
    """Chunks by the scores of their layers' tokens, those of all layers, heads and rows in their order.

    Each becomes fewer entries than it has tokens. The heads may be some of those that had a say in the scores.
    """
    n_exact, n_shared = numbers_of_entries(target, n_shared)
    _, heads, _, chunk_size = shape_of_layers(keys, scores.shape[-1])
    in_chunks = [array.reshape(-1, chunk_size, array.shape[-1]) for array in (keys, values)]
    exact, ordinary = split_by_score(scores, heads, n_exact)  # (chunks, n_exact), (chunks, the others)
    ordinary_parts = [rows_of(array, ordinary) for array in in_chunks]
    destination, is_scored = match_ordinary(ordinary_parts[0], n_shared)
    labels = labels_of(exact, ordinary, destination)
    shared = count_members(destination, n_shared)
    entries = []
    for array, part in zip(in_chunks, ordinary_parts, strict=True):
        means = certified_mean(part.double(), sums_are_exact(part), destination, shared)
        entries.append(torch.cat([rows_of(array, exact).float(), means], dim=1))
    counts = count_members(labels, target)
    return CompressedChunks(labels, counts, entries[0], entries[1], is_scored.numel(), int(is_scored.sum()))


def distinctiveness(
    keys: Float64[Tensor, "layers heads chunks chunk"], values: Float64[Tensor, "layers heads chunks chunk"]
) -> Float64[Tensor, "layers chunks chunk"]:
    """From the likeness of each token's key and value to their means; heads, then tokens of the window, in order.

    Only elementwise additions and a division: the same bits on every device.
    """
    layers, _, chunks, size = keys.shape
    total = keys.new_zeros(layers, chunks, size)
    for head_scores in (2.0 - keys - values).unbind(dim=1):
        total = total + head_scores
    padded = torch.nn.functional.pad(total, (WINDOW // 2, WINDOW // 2))
    inside = torch.nn.functional.pad(torch.ones(size, dtype=total.dtype, device=total.device), (WINDOW // 2,) * 2)
    sums, numbers = torch.zeros_like(total), torch.zeros_like(inside[:size])
    for offset in range(WINDOW):
        sums, numbers = sums + padded[..., offset : offset + size], numbers + inside[offset : offset + size]
    return sums / numbers


def split_by_score(scores: Float64[Tensor, "layers chunks chunk"], heads: int, n_exact: int) -> tuple[Tensor, Tensor]:
    """Places of the `n_exact` tokens of highest score, of ties the first, and of the others, both ascending.

    (layers * heads * chunks, tokens) each, the same for all heads of a layer.
    """
    best_first = scores.argsort(dim=-1, descending=True, stable=True)
    exact, ordinary = best_first[..., :n_exact].sort(dim=-1).values, best_first[..., n_exact:].sort(dim=-1).values
    exact, ordinary = (rows.unsqueeze(1).expand(-1, heads, -1, -1).flatten(0, 2) for rows in (exact, ordinary))
    return exact, ordinary


def labels_of(
    exact: Int64[Tensor, "chunks exact"],
    ordinary: Int64[Tensor, "chunks ordinary"],
    destination: Int64[Tensor, "chunks ordinary"],
) -> Int64[Tensor, "chunks chunk"]:
    """Entry of each token: first the exact ones, then those that the ordinary ones share."""
    chunks, n_exact = exact.shape
    labels = torch.empty(chunks, n_exact + ordinary.shape[1], dtype=torch.int64, device=exact.device)
    labels.scatter_(-1, exact, torch.arange(n_exact, device=exact.device).expand(chunks, -1))
    return labels.scatter_(-1, ordinary, n_exact + destination)


def evenly_spaced(n_shared: int, size: int, device: torch.device) -> Int64[Tensor, " n_shared"]:
    """Which of `size` ordinary tokens are destinations, the first included."""
    return torch.arange(n_shared, device=device) * size // n_shared


def match_ordinary(
    keys: Float[Tensor, "chunks tokens dim"], n_shared: int
) -> tuple[Int64[Tensor, "chunks tokens"], Bool[Tensor, "chunks sources"]]:
    """One round: evenly spaced tokens are destinations, all others join the one that is most like them.

    Returns the destination of each token, and which sources needed canonical scores.
    """
    size = keys.shape[1]
    destinations = evenly_spaced(n_shared, size, keys.device)
    is_source = torch.ones(size, dtype=torch.bool, device=keys.device).index_fill(0, destinations, False)
    matches = certified_matches(keys[:, is_source].float(), keys[:, destinations].float())
    destination = torch.empty(keys.shape[:2], dtype=torch.int64, device=keys.device)
    destination[:, destinations] = torch.arange(n_shared, device=keys.device)
    destination[:, is_source] = matches.destination
    return destination, matches.is_scored
