"""Pooled matching in words, step by step, and what goes wrong in its steps."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from kvcluster.reference.partition import alternating_partition
from kvcluster.reference.pooled_matching import compress_entries, pooled_round
from kvcluster.reference.similarity import halving_sum, similarity
from kvcluster.reference.soft_matching import join
from kvcluster.reference.span_merging import merge_stored, weighted_mean

from .mistake import Mistake, Patch

__all__ = ["POOLING", "told_steps"]


def told_steps(keys: np.ndarray, values: np.ndarray, counts: np.ndarray, target: int, chunk_size: int) -> Iterator[str]:
    """A line for each step of the first leading index, and one for each source in it."""
    first = (0,) * (counts.ndim - 1)
    keys, values, counts = keys[first].astype(np.float32), values[first].astype(np.float32), counts[first]
    while (size := len(keys)) > target:
        n_merged = min(size // 2, size - target)
        labels = pooled_round(keys, n_merged, chunk_size)
        yield f"a step from {size} entries, of which {n_merged} merge, in chunks of {chunk_size}:"
        for at in range(size):
            first_of_chunk = at - at % chunk_size
            others = np.arange(first_of_chunk + 1, min(first_of_chunk + chunk_size, size), 2)
            if (at - first_of_chunk) % 2 == 0 and len(others):
                similarities = similarity(keys[at : at + 1], keys[others])[0]
                match = others[similarities.argmax()]
                does = "merges" if labels[at] == labels[match] else "stays"
                yield f"  source {at} matches destination {match} (similarity {similarities.max():.17g}); it {does}"
        keys, values, counts = merge_stored(keys, values, counts, labels, size - n_merged)


class Pooling:
    """Right pooled matching of one head; a mistake is a subclass with another method."""

    def __init__(self, size: int, chunk_size: int) -> None:
        self.chunk_size = chunk_size
        self.chunk_of_entry = np.arange(size) // chunk_size  # as they were cut first

    def compress(self, keys: np.ndarray, values: np.ndarray, counts: np.ndarray, target: int) -> tuple[np.ndarray, ...]:
        dtypes, weights = (keys.dtype, values.dtype), self.first_weights(counts)
        keys, values = keys.astype(np.float32), values.astype(np.float32)
        while len(keys) > target:
            sources, destinations, similarities, chunks = self.matches(keys)
            merged = self.best_first(similarities, chunks)[: self.n_merged(len(keys), target)]
            if not len(merged):
                break
            labels = join(len(keys), sources[merged], destinations[merged])
            keys, values = (
                self.rounded(self.mean(array, weights, labels), dtype)
                for array, dtype in zip((keys, values), dtypes, strict=True)
            )
            counts, weights = (self.total(numbers, labels) for numbers in (counts, weights))
            weights = self.weights(weights)
            self.chunk_of_entry = self.chunk_of_entry[np.unique(labels, return_index=True)[1]]
            if self.is_over():
                break
        return keys, values, counts

    def first_weights(self, counts: np.ndarray) -> np.ndarray:
        return counts

    def weights(self, weights: np.ndarray) -> np.ndarray:
        return weights

    def n_merged(self, size: int, target: int) -> int:
        return min(size // 2, size - target)

    def is_over(self) -> bool:
        return False

    def chunks(self, size: int) -> list[np.ndarray]:
        return [np.arange(first, min(first + self.chunk_size, size)) for first in range(0, size, self.chunk_size)]

    def matches(self, keys: np.ndarray) -> tuple[np.ndarray, ...]:
        """Source, destination, similarity and chunk of each match."""
        found: list[tuple[int, int, float, int]] = []
        for number, chunk in enumerate(self.chunks(len(keys))):
            sources, destinations = (chunk[part] for part in alternating_partition(len(chunk)))
            if len(destinations):
                similarities = likeness(keys[sources], keys[destinations])
                nearest = self.nearest(similarities)
                numbers = [number] * len(sources)
                found += zip(sources, destinations[nearest], similarities.max(axis=-1), numbers, strict=True)
        if not found:
            return (np.array([], dtype=np.int64),) * 4
        return tuple(np.array(column) for column in zip(*found, strict=True))

    def nearest(self, similarities: np.ndarray) -> np.ndarray:
        return similarities.argmax(axis=-1)

    def best_first(self, similarities: np.ndarray, chunks: np.ndarray) -> np.ndarray:
        return np.argsort(-similarities, kind="stable")

    def mean(self, array: np.ndarray, weights: np.ndarray, labels: np.ndarray) -> np.ndarray:
        return weighted_mean(array, weights, labels)

    def rounded(self, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
        return array

    def total(self, numbers: np.ndarray, labels: np.ndarray) -> np.ndarray:
        return np.bincount(labels, weights=numbers).astype(np.int32)


def likeness(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The canonical similarity, of float64 keys too."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    dot = halving_sum(a[:, None, :] * b[None, :, :])
    norms = halving_sum(a * a)[:, None] * halving_sum(b * b)[None, :]
    return np.where(norms == 0, 0.0, dot * np.abs(dot) / np.where(norms == 0, 1.0, norms))


class EqualShares(Pooling):
    """First the best match of every chunk, then the second best ones."""

    def best_first(self, similarities: np.ndarray, chunks: np.ndarray) -> np.ndarray:
        order = super().best_first(similarities, chunks)
        ranks = np.array([np.count_nonzero(chunks[order[:place]] == chunks[at]) for place, at in enumerate(order)])
        return order[np.argsort(ranks, kind="stable")]


class WorstFirst(Pooling):
    def best_first(self, similarities: np.ndarray, chunks: np.ndarray) -> np.ndarray:
        return super().best_first(-similarities, chunks)


class LastSource(Pooling):
    def best_first(self, similarities: np.ndarray, chunks: np.ndarray) -> np.ndarray:
        return len(similarities) - 1 - super().best_first(similarities[::-1], chunks)


class LastDestination(Pooling):
    def nearest(self, similarities: np.ndarray) -> np.ndarray:
        return similarities.shape[-1] - 1 - similarities[:, ::-1].argmax(axis=-1)


class OldChunks(Pooling):
    def chunks(self, size: int) -> list[np.ndarray]:
        old = [np.flatnonzero(self.chunk_of_entry == chunk) for chunk in np.unique(self.chunk_of_entry)]
        return old if any(len(chunk) > 1 for chunk in old) else super().chunks(size)


class WholeChunks(Pooling):
    def chunks(self, size: int) -> list[np.ndarray]:
        return [chunk for chunk in super().chunks(size) if len(chunk) == self.chunk_size]


class OneStep(Pooling):
    def is_over(self) -> bool:
        return True


class AlwaysHalf(Pooling):
    def n_merged(self, size: int, target: int) -> int:
        return size // 2


class LikeTokens(Pooling):
    def first_weights(self, counts: np.ndarray) -> np.ndarray:
        return np.ones_like(counts)


class Unweighted(LikeTokens):
    def weights(self, weights: np.ndarray) -> np.ndarray:
        return np.ones_like(weights)


class Members(Pooling):
    """A count is how many entries have joined."""

    def total(self, numbers: np.ndarray, labels: np.ndarray) -> np.ndarray:
        return np.bincount(labels).astype(np.int32)


class InFloat64(Pooling):
    def mean(self, array: np.ndarray, weights: np.ndarray, labels: np.ndarray) -> np.ndarray:
        sums = np.full((labels.max() + 1, array.shape[-1]), -0.0)
        np.add.at(sums, labels, array.astype(np.float64) * weights[:, None])
        return sums / np.bincount(labels, weights=weights)[:, None]


class InFloat32(Pooling):
    def mean(self, array: np.ndarray, weights: np.ndarray, labels: np.ndarray) -> np.ndarray:
        sums = np.full((labels.max() + 1, array.shape[-1]), -0.0, dtype=np.float32)
        np.add.at(sums, labels, array * weights[:, None].astype(np.float32))
        return sums / np.bincount(labels, weights=weights)[:, None].astype(np.float32)


class InTheDtype(Pooling):
    def rounded(self, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
        return array.astype(dtype).astype(np.float32)


def compressed_by(wrong: type[Pooling]) -> tuple[Patch, ...]:
    """`compress_entries` that takes head by head."""

    def compress(keys: np.ndarray, values: np.ndarray, counts: np.ndarray, *, target: int, chunk_size: int) -> Any:
        heads = [*np.ndindex(*counts.shape[:-1])]
        if not heads:
            return compress_entries(keys, values, counts, target=target, chunk_size=chunk_size)
        made = [wrong(counts.shape[-1], chunk_size).compress(keys[at], values[at], counts[at], target) for at in heads]
        return tuple(
            np.stack(arrays).reshape(*counts.shape[:-1], *arrays[0].shape) for arrays in zip(*made, strict=True)
        )

    return (("chelsea_cache", "compress_entries", compress),)


def compress_as_the_first_head(
    keys: np.ndarray, values: np.ndarray, counts: np.ndarray, *, target: int, chunk_size: int
) -> Any:
    keys, values = keys.astype(np.float32), values.astype(np.float32)
    while (size := counts.shape[-1]) > target and counts.size:
        n_merged = min(size // 2, size - target)
        first = pooled_round(keys.reshape(-1, *keys.shape[-2:])[0], n_merged, chunk_size)
        keys, values, counts = merge_stored(keys, values, counts, np.broadcast_to(first, counts.shape), size - n_merged)
    return keys, values, counts


POOLING = (
    Mistake(
        "every chunk loses equally many entries: the matches of all chunks are pooled, and the best of them merge",
        "17.8",
        compressed_by(EqualShares),
    ),
    Mistake("the least similar matches merge: the most similar do", "17.8", compressed_by(WorstFirst)),
    Mistake(
        "ties between sources go to the last: of equal matches of all chunks the first merge",
        "17.8",
        compressed_by(LastSource),
    ),
    Mistake("ties between destinations go to the last: the first wins", "17.7", compressed_by(LastDestination)),
    Mistake(
        "chunks are kept from the step before: they are cut anew in every step, of equally many entries",
        "17.7",
        compressed_by(OldChunks),
    ),
    Mistake("a shorter last chunk is left out: it takes part", "17.7", compressed_by(WholeChunks)),
    Mistake("there is one step only: steps go on until the target is reached", "17.6", compressed_by(OneStep)),
    Mistake("the last step halves the entries too: it ends at the target", "17.6", compressed_by(AlwaysHalf)),
    Mistake(
        "all heads share one matching: each is its own problem",
        "17.2",
        (("chelsea_cache", "compress_entries", compress_as_the_first_head),),
    ),
    Mistake(
        "centroids of earlier compressions weigh as one token: each entry weighs by its count",
        "17.9",
        compressed_by(LikeTokens),
    ),
    Mistake("means are not weighted: each entry weighs by its count", "17.9", compressed_by(Unweighted)),
    Mistake("counts are numbers of entries: those of the entries are added", "17.9", compressed_by(Members)),
    Mistake("means are rounded at the end only: to float32 in every step", "17.9", compressed_by(InFloat64)),
    Mistake("means are summed in float32: sums are float64", "17.9", compressed_by(InFloat32)),
    Mistake(
        "means are rounded to the dtype of the cache in every step: they go on in float32",
        "17.9",
        compressed_by(InTheDtype),
    ),
)
