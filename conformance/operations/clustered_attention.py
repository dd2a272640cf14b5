"""`clustered_attention`."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from ..case import Case
from ..drawing import Drawing
from ..inputs import attention_arrays, some_counts
from ..operation import Operation
from .attention import HEADS, WEIGHTS, attention_cases, refused_attention

__all__ = ["OPERATION"]


def cases(base: int) -> Iterator[Case]:
    for index, (name, arrays, parameters) in enumerate(attention_cases(base)):
        counts = some_counts((2, arrays["keys"].shape[1]), index // 2)  # the same with and without a scale
        yield Case("clustered_attention", name, {**arrays, "counts": counts}, parameters)
    arrays = attention_arrays("normal", (1,), 2, 12, 16, "f32", base + 45)
    large = np.array([[1, 2049, 4099, 65503, 1, 1, 300, 7, 1, 1, 2, 30001]])
    yield Case("clustered_attention", "large-counts", {**arrays, "counts": large})
    yield Case("clustered_attention", "counts-of-zero", {**arrays, "counts": large * (np.arange(12) % 3 > 0)})
    keys = np.repeat(arrays["keys"], [3], axis=0)
    batch = {"query": np.stack([arrays["query"][0] * (i + 1) for i in range(3)]), "keys": keys, "values": keys}
    yield Case("clustered_attention", "heads-differ", {**batch, "counts": some_counts((3, 12), 3)})


def refused() -> Iterator[Case]:
    for name, arrays in refused_attention():
        yield Case("clustered_attention", name, {**arrays, "counts": np.ones((1, 8), int)}, is_refused=True)


def small(draw: Drawing) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    tokens = draw.integer(1, 6)
    arrays, parameters = draw.attention(tokens)
    return {**arrays, "counts": draw.counts(tokens, 1)}, parameters


def oracle(case: Case) -> tuple[Any, ...]:
    query, keys, values, counts = (case.arrays[name] for name in ("query", "keys", "values", "counts"))
    return query, keys, values, counts, case.parameters.get("scale")


OPERATION = Operation(
    name="clustered_attention",
    section=8,
    results=("output",),
    cases=cases,
    refused=refused,
    small=small,
    oracle=oracle,
    mistakes=(*WEIGHTS, *HEADS),
    scaffold='''
def clustered_attention(query, keys, values, counts, *, scale=None):
    """(..., group, dim_value)."""
    return my_package.clustered_attention(query, keys, values, counts, scale)
''',
)
