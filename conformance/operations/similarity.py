"""`similarity`."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from kvcluster.reference.similarity import halving_sum
from kvcluster.reference.similarity import similarity as right_similarity

from ..case import Case
from ..changes import flushed
from ..drawing import Drawing
from ..inputs import DTYPES, KINDS, make_array
from ..mistake import Mistake, Patch
from ..operation import Operation

__all__ = ["OPERATION", "SIMILARITY"]


def cases(base: int) -> Iterator[Case]:
    for index, (dtype, kind) in enumerate((d, k) for d in DTYPES for k in KINDS):
        dim = (1, 2, 5, 64, 80, 128)[index % 6]
        arrays = {
            "a": make_array(kind, (2, 7, dim), dtype, base + 10 + index),
            "b": make_array(kind, (2, 9, dim), dtype, base + index),
        }
        yield Case("similarity", f"{kind}-D{dim}-{dtype}", arrays)


def small(draw: Drawing) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    return {"a": draw.rows(draw.integer(1, 6)), "b": draw.rows(draw.integer(1, 3))}, {}


def in_float32(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = (
        x.astype(np.float32) / np.maximum(np.linalg.norm(x.astype(np.float32), axis=-1, keepdims=True), 1e-30)
        for x in (a, b)
    )
    return (a @ np.swapaxes(b, -1, -2)).astype(np.float64)


def dot_product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return halving_sum(a.astype(np.float64)[..., :, None, :] * b.astype(np.float64)[..., None, :, :])


def without_sign(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.abs(right_similarity(a, b))


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    signed_squares = right_similarity(a, b)
    return np.sign(signed_squares) * np.sqrt(np.abs(signed_squares))


def euclidean(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return -((a.astype(np.float64)[..., :, None, :] - b.astype(np.float64)[..., None, :, :]) ** 2).sum(axis=-1)


def flushed_similarity(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return right_similarity(flushed(a), flushed(b))


def everywhere(wrong: object) -> tuple[Patch, ...]:
    places = ("soft_matching", "pooled_matching", "distinctive_matching", "kmeans", "")
    return tuple((place, "similarity", wrong) for place in places)


SIMILARITY = (
    Mistake(
        "similarities are computed in float32: near ties need float64 and halving sums", "2.1", everywhere(in_float32)
    ),
    Mistake(
        "similarities are dot products: they must be divided by both squared norms", "4.1", everywhere(dot_product)
    ),
    Mistake("similarities have lost their sign: it is dot * |dot|", "4.2", everywhere(without_sign)),
    Mistake(
        "similarities are cosines: they must be signed squares of cosines, without a square root",
        "4.1",
        everywhere(cosine),
    ),
    Mistake("similarities are Euclidean distances, not cosines", "4.1", everywhere(euclidean)),
    Mistake("similarities flush subnormal numbers to zero: they must be kept", "2.1", everywhere(flushed_similarity)),
)
OPERATION = Operation(
    name="similarity",
    section=4,
    results=("similarity",),
    cases=cases,
    refused=lambda: iter(()),
    small=small,
    mistakes=SIMILARITY,
    scaffold='''
def similarity(a, b):
    """(..., m, n) float64."""
    return my_package.similarity(a, b)
''',
)
