"""`attention`, and what goes wrong in every other attention too."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from ..case import Case
from ..changes import changed, given, without
from ..drawing import Drawing
from ..inputs import DTYPES, attention_arrays, refused_arrays
from ..mistake import Mistake, Patch
from ..operation import Operation

__all__ = ["HEADS", "OPERATION", "WEIGHTS", "attention_cases", "refused_attention"]


def cases(base: int) -> Iterator[Case]:
    for name, arrays, parameters in attention_cases(base):
        yield Case("attention", name, arrays, parameters)


def attention_cases(base: int) -> Iterator[tuple[str, dict[str, np.ndarray], dict[str, Any]]]:
    """Names, arrays and parameters, each with and without a scale."""
    shapes = ((1, 1, 1), (3, 65, 64), (4, 200, 80), (1, 63, 16), (2, 2, 5))
    for index, (dtype, kind) in enumerate((d, k) for d in DTYPES for k in ("normal", "signs", "smooth", "tiny")):
        group, tokens, dim = shapes[index % len(shapes)]
        arrays = attention_arrays(kind, (2,), group, tokens, dim, dtype, base + 40 + index)
        for scale in (None, 0.3):
            name = f"{kind}-G{group}-T{tokens}-D{dim}-{dtype}-scale{scale or ''}"
            yield name, arrays, {} if scale is None else {"scale": scale}


def refused() -> Iterator[Case]:
    for name, arrays in refused_attention():
        yield Case("attention", name, arrays, is_refused=True)


def refused_attention() -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    keys, bad = refused_arrays()
    for name, values in {**bad, "shapes": keys[:, :7]}.items():
        yield f"refused-{name}", {"query": keys[:, :2], "keys": keys, "values": values}


def small(draw: Drawing) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    return draw.attention(draw.integer(1, 6))


def oracle(case: Case) -> tuple[Any, ...]:
    query, keys, values = (case.arrays[name] for name in ("query", "keys", "values"))
    return query, keys, values, None, case.parameters.get("scale")


def logs(wrong: Callable[[np.ndarray], np.ndarray]) -> tuple[Patch, ...]:
    return (("clustered_attention", "log_counts", wrong),)


def quiet_log(counts: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.log(counts.astype(np.float64))


def log_of_float16(counts: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return quiet_log(np.minimum(counts.astype(np.float16), np.finfo(np.float16).max))


def dealt_in_turn(query: np.ndarray) -> np.ndarray:
    """Query heads dealt out to KV heads in turn instead of in runs."""
    if query.ndim < 3:
        return query
    *lead, heads, group, dim = query.shape
    return query.reshape(*lead, heads * group, dim).reshape(*lead, group, heads, dim).swapaxes(-2, -3)


def dealt_back(output: np.ndarray) -> np.ndarray:
    """The outputs for queries of `dealt_in_turn`, back in the order of the query heads."""
    if output.ndim < 3:
        return output
    *lead, heads, group, dim = output.shape
    return output.swapaxes(-2, -3).reshape(*lead, heads, group, dim)


WEIGHTS = (
    Mistake(
        "log counts are missing: a centroid of n tokens needs log n added to its logit",
        "8.1",
        logs(lambda counts: np.where(counts > 0, 0.0, -np.inf)),
    ),
    Mistake(
        "logarithms of counts have base 2: they are natural", "8.1", logs(lambda counts: quiet_log(counts) / np.log(2))
    ),
    Mistake(
        "counts went through float16, which is inexact above 2,048: log counts need float32 or better",
        "8.1",
        logs(log_of_float16),
    ),
    Mistake(
        "an entry of count 0 is attended to: its weight is 0",
        "8.2",
        logs(lambda counts: quiet_log(np.maximum(counts, 1))),
    ),
    Mistake("scale is ignored where it is given", "7.1", change=without("scale")),
    Mistake("logits are not scaled: the default is 1 / sqrt(dim)", "7.1", change=given(scale=1.0)),
)
HEADS = (
    Mistake(
        "KV heads and groups are confused: query heads of one KV head lie together",
        "1.1",
        change=changed(query=dealt_in_turn),
        restore=dealt_back,
    ),
    Mistake(
        "KV heads are confused: each group of queries has its own leading index",
        "1.1",
        change=changed(query=lambda query: query[..., ::-1, :, :] if query.ndim > 2 else query),
    ),
)
OPERATION = Operation(
    name="attention",
    section=7,
    results=("output",),
    cases=cases,
    refused=refused,
    small=small,
    oracle=oracle,
    mistakes=(*WEIGHTS, *HEADS),
    scaffold='''
def attention(query, keys, values, *, scale=None):
    """(..., group, dim_value)."""
    return my_package.attention(query, keys, values, scale)
''',
)
