"""Distinctive matching with one ingredient changed, in plain torch: what `benchmarks/ablation/run.py` compares.

`Settings()` decides as `kvcluster.fast.distinctive_matching` does, which a test checks. Sums are plain float64 sums,
without the package's care for ties and bits.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from benchmarks.ablation.layer_ratios import READING_LAYERS, layer_ratios
from benchmarks.ablation.packed_scoring import Held
from kvcluster.fast.plain.soft_matching import compress

__all__ = [
    "PANELS",
    "Settings",
    "cluster_distinctive",
    "compress_layer",
    "compress_layers",
    "describe",
]

N_SINK = 4
FOUND_ANEW = (18, 7, 17, 20, 21, 23, 15, 8, 6)  # by benchmarks/ablation/reading_layers.py on the same contexts
MANY = 2**40  # more than any chunk has


def few_whole(
    ratio: float,
    n_layers: int,
    chunk_size: int,
    *,
    reading_layers: tuple[int, ...] = READING_LAYERS,
    n_middle: int = 64,
) -> list[int]:
    """Entries of a chunk in each layer, as `layer_ratios` shares them out; its numbers are those of 256 tokens."""
    sizes = {"chunk_size": chunk_size, "n_least": 5 * chunk_size // 256, "n_middle": n_middle * chunk_size // 256}
    ratios = layer_ratios(reading_layers, n_layers=n_layers, keep_ratio=ratio, **sizes)
    return [round(ratio_of_layer * chunk_size + 0.5) if ratio_of_layer < 1 else chunk_size for ratio_of_layer in ratios]


def reading_alike(ratio: float, n_layers: int, chunk_size: int) -> list[int]:
    """The reading layers all get the same number of entries, so none is whole."""
    return few_whole(ratio, n_layers, chunk_size, n_middle=256)


def found_whole(ratio: float, n_layers: int, chunk_size: int) -> list[int]:
    """As `few_whole`, with the reading layers that reading_layers.py found, not those that are shipped."""
    return few_whole(ratio, n_layers, chunk_size, reading_layers=FOUND_ANEW)


def alike(ratio: float, n_layers: int, chunk_size: int) -> list[int]:
    """All layers get the same number of entries."""
    return [int(ratio * chunk_size)] * n_layers


def distinctiveness(
    array: Float[Tensor, "heads chunks chunk dim"], later: Tensor
) -> Float64[Tensor, "heads chunks chunk"]:
    """How far each token points away from the mean of its chunk."""
    tokens = array.double()
    mean = tokens.mean(dim=-2, keepdim=True).float().double()
    dot = (tokens * mean).sum(dim=-1)
    norms = tokens.square().sum(dim=-1) * mean.square().sum(dim=-1)
    return 1 - torch.where(norms == 0, 0.0, dot * dot.abs() / norms)


def lag_score(
    array: Float[Tensor, "heads chunks chunk dim"], later: Float[Tensor, "heads chunks chunk dim"]
) -> Float64[Tensor, "heads chunks chunk"]:
    """LagKV's (arXiv:2504.04704): how much channels differ, scaled by their range in the chunk that comes next."""
    least, most = (x.double() for x in later.aminmax(dim=-2, keepdim=True))
    return ((array.double() - least) / (most - least)).std(dim=-1).softmax(dim=-1)


def cluster_distinctive(
    keys: Tensor, values: Tensor, later: tuple[Tensor, Tensor], target: int, settings: "Settings"
) -> Int64[Tensor, "heads chunks chunk"]:
    """Entry of each token of chunks (heads, chunks, chunk, dim), from 0 in each chunk; -1 for an evicted one."""
    pairs = {"keys": (keys, later[0]), "values": (values, later[1])}
    score = sum(settings.score(*pairs[part]) for part in settings.parts)  # (heads, chunks, chunk)
    if settings.are_heads_together:
        score = score.sum(dim=0, keepdim=True).expand_as(score)
    score = torch.nn.functional.avg_pool1d(
        score, settings.window, 1, settings.window // 2, count_include_pad=False
    )  # near the ends, over the tokens inside the chunk
    n_shared = min(settings.n_shared, max(1, min(settings.n_shared, target // 2)))  # 0 stays 0: the rest is evicted
    n_exact = target - n_shared
    best_first = score.argsort(dim=-1, descending=True, stable=True)
    exact, ordinary = (rows.sort(dim=-1).values for rows in best_first.split([n_exact, score.shape[-1] - n_exact], -1))
    labels = torch.full(score.shape, -1)
    labels.scatter_(-1, exact, torch.arange(n_exact).expand(exact.shape))
    if n_shared:
        directions = torch.nn.functional.normalize(take(keys, ordinary).double(), dim=-1)
        destinations = torch.arange(n_shared) * directions.shape[-2] // n_shared
        match = (directions @ directions[..., destinations, :].mT).argmax(dim=-1)
        match[..., destinations] = torch.arange(n_shared)
        labels.scatter_(-1, ordinary, n_exact + match)
    return labels


def cluster_softly(
    keys: Tensor, values: Tensor, later: tuple[Tensor, Tensor], target: int, settings: "Settings"
) -> Int64[Tensor, "heads chunks chunk"]:
    """By chunked soft matching of the keys, as published; the package's own."""
    *lead, size, dim = keys.shape
    return compress(keys.reshape(-1, dim), None, chunk_size=size, target=target).labels.reshape(*lead, size)


@dataclass(frozen=True)
class Settings:
    """What an ablation changes; the defaults are what the package does.

    Attributes
    ----------
    window : tokens of the moving average of the scores.
    are_heads_together : whether all KV heads keep the same tokens.
    parts : whose score counts.
    chunk_size : tokens that are clustered together. A last chunk that is not whole gets its share of entries, though
        the package would leave it exact, so that a change of sizes does not change what is exact.
    n_shared : entries that the ordinary tokens of a chunk share; 0 to evict them.
    n_recent : last tokens, exact.
    share_out : entries of a chunk in each layer, from the mean ratio, the number of layers, and the size of a chunk.
    score : of each token (heads, chunks, chunk), from chunks and the tokens after each chunk.
    cluster : labels of chunks.
    """

    window: int = 7
    are_heads_together: bool = True
    parts: tuple[str, ...] = ("keys", "values")
    chunk_size: int = 256
    n_shared: int = 4
    n_recent: int = 252
    share_out: Callable[[float, int, int], list[int]] = few_whole
    score: Callable[[Tensor, Tensor], Tensor] = distinctiveness
    cluster: Callable[..., Tensor] = cluster_distinctive


def compress_layers(read: list[tuple[Tensor, Tensor]], keep: float, settings: Settings) -> list[Held]:
    """All layers, with `keep` entries per token on average, sinks and recent tokens included."""
    n_tokens = read[0][0].shape[1]
    body = n_tokens - N_SINK - settings.n_recent
    ratio = (keep * n_tokens - N_SINK - settings.n_recent) / body
    targets = settings.share_out(ratio, len(read), settings.chunk_size)
    return [compress_layer(*pair, target, settings) for pair, target in zip(read, targets, strict=True)]


def compress_layer(
    keys: Float[Tensor, "heads tokens dim"], values: Float[Tensor, "heads tokens dim"], target: int, settings: Settings
) -> Held:
    """One layer, with `target` entries for each chunk."""
    size, stop = settings.chunk_size, keys.shape[1] - settings.n_recent
    n_whole, n_left = divmod(stop - N_SINK, size)
    ends = [N_SINK + n_whole * size, stop]
    parts = [unclustered(keys[:, :N_SINK], values[:, :N_SINK])]
    for start, end, length in ((N_SINK, ends[0], size), (*ends, n_left)):
        if start < end:
            parts.append(compress_span(keys, values, start, end, length, max(1, target * length // size), settings))
    parts.append(unclustered(keys[:, stop:], values[:, stop:]))
    return Held(*(torch.cat(column, dim=1) for column in zip(*parts, strict=True)))


Entries = tuple[Tensor, Tensor, Tensor]  # keys, values, counts


def unclustered(keys: Tensor, values: Tensor) -> Entries:
    return keys, values, torch.ones(keys.shape[:2], dtype=torch.int64)


def compress_span(
    keys: Tensor, values: Tensor, start: int, end: int, length: int, target: int, settings: Settings
) -> Entries:
    """Tokens `start` to `end`, chunks of `length` tokens that become `target` entries each."""
    if target >= length:
        return unclustered(keys[:, start:end], values[:, start:end])
    chunks = [array[:, start:end].unflatten(1, (-1, length)) for array in (keys, values)]
    later = tuple(chunks_after(array, start, end, length) for array in (keys, values))
    labels = settings.cluster(*chunks, later, target, settings)
    counts = torch.zeros(*labels.shape[:2], target + 1, dtype=torch.int64)
    counts.scatter_add_(-1, labels % (target + 1), torch.ones_like(labels))  # -1 is last
    means = [mean(array, labels % (target + 1), counts) for array in chunks]
    return *(array.flatten(1, 2) for array in means), counts[..., :target].flatten(1, 2)


def chunks_after(array: Tensor, start: int, end: int, length: int) -> Float[Tensor, "heads chunks chunk dim"]:
    """The `length` tokens that follow each chunk, the last repeated where there are not so many."""
    rows = torch.arange(start + length, end + length).clamp(max=array.shape[1] - 1)
    return array[:, rows].unflatten(1, (-1, length))


def mean(array: Tensor, labels: Tensor, counts: Tensor) -> Float[Tensor, "heads chunks entries dim"]:
    """Of each entry's tokens, in float32; the last entry, of evicted tokens, is left out."""
    sums = torch.zeros(*counts.shape, array.shape[-1], dtype=torch.float64)
    sums.scatter_add_(-2, labels.unsqueeze(-1).expand(array.shape), array.double())
    return (sums[..., :-1, :] / counts[..., :-1, None]).float()


def take(array: Tensor, rows: Tensor) -> Tensor:
    """The chosen rows (..., chosen) of `array` (..., chunk, dim)."""
    return array.gather(-2, rows.unsqueeze(-1).expand(*rows.shape, array.shape[-1]))


def describe(settings: Settings) -> str:
    """What differs from the default; runs are identified by it."""
    default = Settings()
    pairs = [(field.name, getattr(settings, field.name), getattr(default, field.name)) for field in fields(settings)]
    changes = [f"{name}={getattr(value, '__name__', value)}" for name, value, usual in pairs if value != usual]
    return ", ".join(changes) or "default"


def changed(**changes: Any) -> Settings:
    return replace(Settings(), **changes)


# The variants of each ingredient, in the order of figures.
ALIKE = {"share_out": alike}
ALONE = {"are_heads_together": False}
PANELS: dict[str, dict[str, Settings]] = {
    "scores averaged over tokens": {
        "1: no average": changed(window=1),
        "3": changed(window=3),
        "7": Settings(),
        "11": changed(window=11),
    },
    "exact tokens chosen by": {
        "all KV heads together": Settings(),
        "each KV head for itself": changed(**ALONE),
    },
    "what must stand out": {
        "key and value": Settings(),
        "the key alone": changed(parts=("keys",)),
        "the value alone": changed(parts=("values",)),
    },
    "tokens in a chunk": {
        "128": changed(chunk_size=128),
        "256": Settings(),
        "512": changed(chunk_size=512),
    },
    "entries that ordinary tokens share": {
        "none: they are evicted": changed(n_shared=0),
        "1": changed(n_shared=1),
        "4": Settings(),
        "16": changed(n_shared=16),
        "half of all": changed(n_shared=MANY),
    },
    "recent tokens, of the same budget": {
        "64": changed(n_recent=64),
        "124": changed(n_recent=124),
        "252": Settings(),
    },
    "how layers share the budget": {
        "few whole, some middling": Settings(),
        "... with layers found anew": changed(share_out=found_whole),
        "nine reading layers alike": changed(share_out=reading_alike),
        "all layers alike": changed(**ALIKE),
    },
    "what else could decide": {
        "distinctive tokens stay": Settings(),
        "LagKV's score": changed(score=lag_score),
        "LagKV's, head by head, no average": changed(score=lag_score, window=1, **ALONE),
        "chunked soft matching": changed(cluster=cluster_softly),
        "... all layers alike": changed(cluster=cluster_softly, **ALIKE),
        "... as published": changed(cluster=cluster_softly, chunk_size=64, n_recent=64, **ALIKE),
    },
    "with all layers alike:": {
        "no other change": changed(**ALIKE),
        "no average": changed(window=1, **ALIKE),
        "each KV head for itself": changed(**ALONE, **ALIKE),
        "both of these": changed(window=1, **ALONE, **ALIKE),
        "the key alone": changed(parts=("keys",), **ALIKE),
        "the value alone": changed(parts=("values",), **ALIKE),
        "ordinary tokens evicted": changed(n_shared=0, **ALIKE),
        "LagKV's score": changed(score=lag_score, **ALIKE),
    },
}
