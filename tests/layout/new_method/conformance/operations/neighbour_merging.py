"""`neighbour_merging`. The worked example of CONTRIBUTING.md."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from ..case import Case
from ..drawing import Drawing
from ..inputs import DTYPES, make_array, refused_arrays
from ..mistake import Mistake
from ..operation import Operation
from .chunked_soft_matching import TARGET

__all__ = ["OPERATION"]


def cases(base: int) -> Iterator[Case]:
    for dtype in DTYPES:
        for keep_ratio, chunk_size in ((0.5, 8), (0.3, 13), (1.0, 4)):
            keys = make_array("normal", (2, 40, 5), dtype, base + 200)
            parameters = {"keep_ratio": keep_ratio, "chunk_size": chunk_size}
            yield Case("neighbour_merging", f"C{chunk_size}-keep{keep_ratio}-{dtype}", {"keys": keys}, parameters)


def refused() -> Iterator[Case]:
    for name, keys in refused_arrays()[1].items():
        yield Case("neighbour_merging", f"refused-{name}", {"keys": keys}, {"keep_ratio": 0.5}, is_refused=True)


def small(draw: Drawing) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    keys = draw.rows(draw.integer(1, 9))
    return {"keys": keys}, {"keep_ratio": draw.ratio(), "chunk_size": draw.integer(1, 8)}


def longest_last(keys: np.ndarray, target: int) -> np.ndarray:
    return target - 1 - np.arange(len(keys))[::-1] * target // len(keys)


MISTAKES = (
    Mistake(
        "runs are counted from the end: from the beginning", "21.1", (("neighbour_merging", "runs", longest_last),)
    ),
)
OPERATION = Operation(
    name="neighbour_merging",
    section=21,
    results=("labels", "counts"),
    cases=cases,
    refused=refused,
    small=small,
    mistakes=(*TARGET, *MISTAKES),
    scaffold='''
def neighbour_merging(keys, *, keep_ratio, chunk_size=64):
    """labels (..., tokens), counts (..., entries)."""
    return my_package.merge_neighbours(keys, keep_ratio, chunk_size)
''',
)
