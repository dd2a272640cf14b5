"""What can be wrong with the arguments of a call, in about 90 kinds."""

import random
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np

__all__ = ["N_KINDS", "spoil"]

NO_INTEGERS = (-1, -7, 0, 2.5, 2.0, True, "4", b"4", None, float("nan"), 1j, Fraction(7, 2), Decimal(4), (4,), [4])
NO_INTEGERS += (np.float32(4), np.array(4.0), np.array([4, 5]), {}, slice(4))
NO_SHARES = (-0.5, -1, 1.5, 2, float("nan"), float("inf"), "half", None, True, 1j, Decimal("0.5"), (0.5,), {})
NO_SHARES += (np.array([0.5, 0.5]), np.float32("nan"))
NO_SCALES = (float("nan"), float("inf"), -float("inf"), "1", 1j, (1.0,), True, Decimal(1), np.float32("inf"))
NO_RATIOS: tuple[Any, ...] = ("0.5", 0.5, (), None, (0.5,) * 7, (0.5, 2), (0.5, "a"), (None,), {0.5}, (1j, 0.5))
NO_HEADS: tuple[Any, ...] = ("01", 1, (-1,), (0, 0), (9,), (True,), (0.5,), None, {0}, ("0",))
NO_BITS: tuple[Any, ...] = (5, 32, 0, -4, (4,), (4, 4, 4), (4, 5), "4", 4.0, True, None, (4.0, 4), (4, 16), (True, 4))
NO_METHODS = (None, "soft", 3, dict)
SHARES = ("keep_ratio", "ratio", "share", "spread", "recent_share")
WRONG: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(SHARES, NO_SHARES),
    "scale": NO_SCALES,
    "keep_ratios": NO_RATIOS,
    "whole_heads": NO_HEADS,
    "bits": NO_BITS,
    "method": NO_METHODS,
}
NOT_CHECKED = ("pieces", "is_centred", "centroids_for_rest", "is_per_query_head", "is_exact_counted")


def at_one_place(value: float) -> Callable[[random.Random, np.ndarray], Any]:
    def change(draw: random.Random, array: np.ndarray) -> np.ndarray:
        array = array.copy()
        if array.size:
            array.reshape(-1)[draw.randrange(array.size)] = value
        return array

    return change


NO_ARRAYS: dict[str, Callable[[random.Random, np.ndarray], Any]] = {
    "a list": lambda draw, array: array.astype(np.float64).tolist(),
    "None": lambda draw, array: None,
    "text": lambda draw, array: "array",
    "no axis": lambda draw, array: array.reshape(-1)[:1].reshape(()) if array.size else array[..., :0].reshape(0),
    "one axis": lambda draw, array: array.reshape(-1),
}
WRONG_ARRAYS: dict[str, Callable[[random.Random, np.ndarray], Any]] = {
    "NaN": at_one_place(float("nan")),
    "infinity": at_one_place(float("inf")),
    "minus infinity": at_one_place(-float("inf")),
    "float64": lambda draw, array: array.astype(np.float64),
    "int32": lambda draw, array: np.zeros(array.shape, np.int32),
    "bool": lambda draw, array: np.ones(array.shape, bool),
    "complex": lambda draw, array: np.ones(array.shape, np.complex64),
    "float16": lambda draw, array: np.ones(array.shape, np.float16),
    "dim 0": lambda draw, array: array[..., :0],
    "dim + 1": lambda draw, array: np.concatenate([array, array[..., -1:]], axis=-1),
    "no tokens": lambda draw, array: array[..., :0, :],
    "tokens + 1": lambda draw, array: np.concatenate([array, array[..., -1:, :]], axis=-2),
    "one more axis": lambda draw, array: np.stack([array, array]),
    "one row": lambda draw, array: array[:1],
    "huge": lambda draw, array: np.full(array.shape, 3e38, np.float32),
}
WRONG_COUNTS: dict[str, Callable[[random.Random, np.ndarray], Any]] = {
    "negative": at_one_place(-1),
    "zeros": lambda draw, array: np.zeros_like(array),
    "one 0": at_one_place(0),
    "too many": at_one_place(97),
    "2**31": lambda draw, array: at_one_place(2**31)(draw, array.astype(np.int64)),
    "floats": lambda draw, array: array.astype(np.float32),
    "bool": lambda draw, array: array.astype(bool),
    "complex": lambda draw, array: array.astype(np.complex64),
    "one more": lambda draw, array: np.concatenate([array, array[..., -1:]], axis=-1),
    "one less": lambda draw, array: array[..., :-1],
    "one more axis": lambda draw, array: np.stack([array, array]),
}
CLUSTERS = ("labels", "counts", "centroids")  # are taken as `kmeans` gives them
INTEGERS = ("counts", "labels", "init")
N_KINDS = sum(map(len, (NO_INTEGERS, NO_SHARES, NO_SCALES, NO_RATIOS, NO_HEADS, NO_BITS, NO_METHODS)))
N_KINDS += sum(map(len, (NO_ARRAYS, WRONG_ARRAYS, WRONG_COUNTS)))


def spoil(draw: random.Random, operation: str, arrays: dict[str, Any], parameters: dict[str, Any]) -> list[str]:
    """Change one argument to what it must not be, or hardly; say which."""
    passed_on = CLUSTERS if operation == "recall_attention" else ()
    names = [name for name, array in arrays.items() if isinstance(array, np.ndarray) and name not in passed_on]
    numbers = [name for name in parameters if name not in NOT_CHECKED]
    if numbers and draw.random() < 0.5:
        name = draw.choice(numbers)
        parameters[name] = draw.choice(WRONG.get(name, NO_INTEGERS))
        return [f"{name}={parameters[name]!r}"]
    if not names:
        return []
    name = draw.choice(names)
    kinds = dict(WRONG_COUNTS if name in INTEGERS and arrays[name].dtype.kind in "iu" else WRONG_ARRAYS)
    # what is cut into pieces, or of which the harness makes clusters, must be an array
    is_passed_on = operation[0].islower() and name not in (*CLUSTERS, "keys")
    if is_passed_on or (name == "query" and operation[0].isupper()):
        kinds |= NO_ARRAYS
    kind = draw.choice(list(kinds))
    with np.errstate(all="ignore"):
        arrays[name] = kinds[kind](draw, arrays[name])
    return [f"{name}: {kind}"]
