"""`merge`, and the means of every other operation."""

import sys
from collections import namedtuple
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from kvcluster.reference import merge as right_merge
from kvcluster.reference.merging import Clustering

from ..case import Case
from ..changes import flushed
from ..drawing import Drawing
from ..inputs import DTYPES, KINDS, make_array, refused_arrays
from ..mistake import Mistake, Patch
from ..operation import Operation
from ..port import Port

__all__ = ["MEANS", "OPERATION", "ROUNDED", "rounded_mean"]

right_update = sys.modules["kvcluster.reference.kmeans"].update
# What a clustering looks like to a port, whatever its arrays are.
PortClustering = namedtuple("PortClustering", ("labels", "counts"))


def cases(base: int) -> Iterator[Case]:
    for index, (dtype, kind) in enumerate((d, k) for d in DTYPES for k in KINDS):
        tokens, entries = 60, (1, 7, 60)[index % 3]
        labels = scattered_labels((2, tokens), entries, base + 30 + index)
        counts = np.stack([np.bincount(row, minlength=entries) for row in labels])
        array = make_array(kind, (2, tokens, 12), dtype, base + 30 + index)
        yield Case("merge", f"{kind}-E{entries}-{dtype}", {"array": array, "labels": labels, "counts": counts})
    negative = np.full((1, 4, 3), -0.0, np.float32)
    arrays = {"array": negative, "labels": np.array([[0, 1, 1, 2]]), "counts": np.array([[1, 2, 1]])}
    yield Case("merge", "negative-zeros", arrays)
    wide = np.array([[[2.0**80], [1.0], [-(2.0**80)], [3.0]]], np.float32)  # the order of addition shows
    yield Case("merge", "wide-range", {"array": wide, "labels": np.zeros((1, 4), int), "counts": np.array([[4]])})


def scattered_labels(shape: tuple[int, int], entries: int, seed: int) -> np.ndarray:
    """Labels (problems, tokens), every entry with at least one token."""
    order = make_array("normal", (*shape, 1), "f32", seed)[..., 0].argsort(axis=-1, kind="stable")
    return np.take_along_axis(np.arange(shape[1])[None].repeat(shape[0], 0) % entries, order, axis=-1)


def refused() -> Iterator[Case]:
    array, bad = refused_arrays()
    labels, counts = np.zeros((1, 8), int), np.array([[8]])
    for name, wrong in bad.items():
        arrays = {"array": wrong, "labels": labels, "counts": counts}
        yield Case("merge", f"refused-{name}", arrays, is_refused=True)
    arrays = {"array": array, "labels": labels, "counts": counts - 1}
    yield Case("merge", "refused-counts", arrays, is_refused=True)


def small(draw: Drawing) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    tokens = draw.integer(1, 6)
    labels = np.unique(draw.integers(tokens, 0, 2), return_inverse=True)[1]
    of_heads = {"labels": np.tile(labels, (draw.heads, 1)), "counts": np.tile(np.bincount(labels), (draw.heads, 1))}
    return {"array": draw.rows(tokens), **of_heads}, {}


def positional(operation: Operation, port: Port, case: Case) -> list[Any]:
    array, labels, counts = (port.from_numpy(case.arrays[name]) for name in ("array", "labels", "counts"))
    return [array, PortClustering(labels, counts)]


def mean_by(add: Callable[[np.ndarray], np.ndarray]) -> Callable[..., np.ndarray]:
    """`merge` whose sums are `add` of a cluster's members (members, dim)."""

    def wrong_merge(array: np.ndarray, clustering: Clustering) -> np.ndarray:
        right_merge(array, clustering)  # its errors
        labels, counts = clustering.labels, clustering.counts
        means = np.empty((*counts.shape, array.shape[-1]), np.float32)
        for place in np.ndindex(*counts.shape):
            total = add(array[place[:-1]][labels[place[:-1]] == place[-1]])
            means[place] = (total / total.dtype.type(counts[place])).astype(np.float32)
        return means

    return wrong_merge


def add_descending(members: np.ndarray) -> np.ndarray:
    return np.add.accumulate(members[::-1].astype(np.float64), axis=0)[-1]


def add_in_float32(members: np.ndarray) -> np.ndarray:
    return np.add.accumulate(members.astype(np.float32), axis=0, dtype=np.float32)[-1]


def add_to_zero(members: np.ndarray) -> np.ndarray:
    return np.add.accumulate(np.concatenate([np.zeros((1, members.shape[-1])), members.astype(np.float64)]), axis=0)[-1]


def flushed_mean(array: np.ndarray, clustering: Clustering) -> np.ndarray:
    return flushed(right_merge(flushed(array), clustering))


def unit(array: np.ndarray) -> np.ndarray:
    """Rows of length 1."""
    lengths = np.sqrt((array.astype(np.float64) ** 2).sum(axis=-1, keepdims=True))
    return array.astype(np.float64) / np.where(lengths == 0, 1.0, lengths)


def unit_mean(array: np.ndarray, clustering: Clustering) -> np.ndarray:
    return unit(right_merge(array, clustering)).astype(np.float32)


def add_units(members: np.ndarray) -> np.ndarray:
    return np.add.accumulate(unit(members), axis=0)[-1]


def rounded_mean(array: np.ndarray, clustering: Clustering) -> np.ndarray:
    return right_merge(array, clustering).astype(array.dtype).astype(np.float32)


def everywhere(wrong: Callable[..., np.ndarray]) -> tuple[Patch, ...]:
    """A wrong `merge` wherever the reference uses it, and the same mean in k-means."""

    def update(keys: np.ndarray, labels: np.ndarray, centroids: np.ndarray) -> np.ndarray:
        used, entry = np.unique(labels, return_inverse=True)
        means = centroids.copy()
        if len(used) and keys.dtype != np.float64:  # not deviations
            means[used] = wrong(keys, Clustering(entry, np.bincount(entry)))
        return means if keys.dtype != np.float64 else right_update(keys, labels, centroids)

    merged = [(module, "merge", wrong) for module in ("", "cache", "soft_matching", "distinctive_matching")]
    return (*merged, *((module, "update", update) for module in ("kmeans", "recall")))


MEANS = (
    Mistake(
        "members are added in another order: ascending tokens, one after the other",
        "6.1",
        everywhere(mean_by(add_descending)),
    ),
    Mistake(
        "members are added in float32: sums are float64, rounded once after the division",
        "6.1",
        everywhere(mean_by(add_in_float32)),
    ),
    Mistake(
        "sums start at +0.0, which loses the sign of -0.0: they start at the first member",
        "6.2",
        everywhere(mean_by(add_to_zero)),
    ),
    Mistake("means flush subnormal numbers to zero: they must be kept", "2.1", everywhere(flushed_mean)),
    Mistake("means are scaled to length 1: they stay as they are", "6.1", everywhere(unit_mean)),
    Mistake(
        "members are scaled to length 1 before they are averaged: they are added as they are",
        "6.1",
        everywhere(mean_by(add_units)),
    ),
)
ROUNDED = (
    Mistake(
        "centroids are rounded to the dtype of the tokens: they are float32",
        "6.3",
        everywhere(rounded_mean),
    ),
)
OPERATION = Operation(
    name="merge",
    section=6,
    results=("centroids",),
    cases=cases,
    refused=refused,
    small=small,
    positional=positional,
    mistakes=(*MEANS, *ROUNDED),
    scaffold='''
def merge(array, clustering):
    """(..., entries, dim) float32; clustering has .labels and .counts."""
    return my_package.merge(array, clustering.labels, clustering.counts)
''',
)
