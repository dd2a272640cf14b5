"""What all caches share: construction, filling piece by piece, and attention."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from .case import Case
from .drawing import Drawing
from .inputs import refused_arrays
from .operation import Spelling
from .port import Port

__all__ = [
    "BESIDE",
    "attended",
    "beside",
    "cache_spelling",
    "fill",
    "good_tokens",
    "held_by",
    "numbers_of",
    "refused_tokens",
    "small_tokens",
]

# Compared where a cache shows them; files of vectors, which came before, are without them.
BESIDE = {"n_clustered", "nbytes", "bytes_of_count", "deviations", "members", "all_returned_keys"}
BESIDE |= {"all_returned_values", "all_returned_counts"}


def cache_spelling(port: Port, case: Case) -> Spelling:
    """The class that the case names, and the parameters of its constructor."""
    parameters = {name: value for name, value in case.parameters.items() if name not in ("pieces", "scale")}
    return getattr(port.namespace, case.operation), parameters


def fill(port: Port, cache: Any, case: Case) -> Any:
    """Append all tokens of a case, piece by piece; what the last append returns."""
    start, returned = 0, None
    for piece in case.parameters["pieces"]:
        span = slice(start, start + piece)
        returned = cache.append(*(port.from_numpy(case.arrays[name][..., span, :]) for name in ("keys", "values")))
        start += piece
    return returned


def held_by(port: Port, cache: Any, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The arrays that a cache stores, as far as it shows them."""
    return {name: port.to_numpy(getattr(cache, name)) for name in names if getattr(cache, name, None) is not None}


def numbers_of(port: Port, cache: Any, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The numbers that a cache tells, as far as it does."""
    return {name: port.number(getattr(cache, name)) for name in names if getattr(cache, name, None) is not None}


def beside(port: Port, cache: Any, returned: Any) -> dict[str, np.ndarray]:
    """What else a cache may show: how much it has clustered and takes, and all that its last append returned.

    Of entries in one rectangle only those that are there: zeros where the count is 0.
    """
    results = numbers_of(port, cache, ("n_clustered", "nbytes"))
    if getattr(cache, "counts", None) is not None:
        results["bytes_of_count"] = np.array(port.to_numpy(cache.counts).dtype.itemsize)
    if isinstance(returned, tuple) and len(returned) == 3:
        keys, values, counts = (port.to_numpy(array) for array in returned)
        if keys.shape[:-1] == counts.shape == values.shape[:-1]:
            keys, values = (np.where(counts[..., None] > 0, array, np.zeros_like(array)) for array in (keys, values))
        results |= {"all_returned_keys": keys, "all_returned_values": values, "all_returned_counts": counts}
    return results


def attended(port: Port, cache: Any, case: Case) -> dict[str, np.ndarray]:
    """The attention output for the query of a case."""
    scale = {"scale": case.parameters["scale"]} if "scale" in case.parameters else {}
    return {"output": port.to_numpy(cache.attend(port.from_numpy(case.arrays["query"]), **scale))}


def small_tokens(draw: Drawing) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Tokens of a small case: first many at once, then one by one."""
    tokens = draw.integer(1, 14)
    cut = draw.integer(0, tokens)
    arrays, parameters = draw.attention(tokens)
    return arrays, {**parameters, "pieces": (tokens,) if cut == tokens else (cut, *[1] * (tokens - cut))}


def refused_tokens(operation: str, rule: dict[str, Any], wrong: dict[str, Any]) -> Iterator[Case]:
    """Appends that a cache with the valid parameters `rule` must refuse, and a cache with the parameters `wrong`."""
    good = good_tokens()
    for name, array in refused_arrays()[1].items():
        arrays = {**good, "keys": array}
        yield Case(operation, f"refused-{name}", arrays, {**rule, "pieces": (8,)}, is_refused=True)
    yield Case(operation, "refused-parameter", good, {**wrong, "pieces": (8,)}, is_refused=True)


def good_tokens() -> dict[str, np.ndarray]:
    """Eight tokens that no cache refuses, and a query."""
    keys, _ = refused_arrays()
    return {"query": keys[:, :2], "keys": keys, "values": keys}
