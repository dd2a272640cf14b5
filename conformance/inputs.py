"""Inputs that are awkward on purpose, and the same to the last bit on every machine."""

from typing import Any

import numpy as np
from jaxtyping import Float

__all__ = [
    "DTYPES",
    "EXACT_TIES",
    "EXTREMES",
    "KINDS",
    "TIES",
    "attention_arrays",
    "make_array",
    "refused_arrays",
    "some_counts",
]

KINDS = ("normal", "signs", "duplicates", "near_ties", "zeros", "huge", "tiny", "smooth")
EXTREMES = {"huge", "tiny"}
EXACT_TIES = {"signs", "duplicates", "ties", "equal"}  # where the index decides
TIES = {"near_ties", "signs", "duplicates", *EXTREMES}  # where the last bit decides
DTYPES = {"f16": np.dtype(np.float16), "f32": np.dtype(np.float32)}
try:
    import ml_dtypes
except ModuleNotFoundError:  # then bfloat16, which NumPy does not know, is not checked
    pass
else:
    DTYPES["bf16"] = np.dtype(ml_dtypes.bfloat16)


def make_array(kind: str, shape: tuple[int, ...], dtype: str, seed: int) -> Float[np.ndarray, "..."]:
    """Keys or values (..., tokens, dim) of one kind, in one of `DTYPES`.

    `signs` (all numbers +-1) give exact ties by the dozen, `near_ties` differ in the last bit, half of the rows of
    `zeros` are zero, `huge` and `tiny` are near the ends of the dtype, neighbours in `smooth` are alike, as in a model.
    """
    number_type: Any = DTYPES[dtype]
    bell = bell_shaped(shape, seed)
    if kind == "signs":
        array = np.where(bell < 0, -1.0, 1.0)
    elif kind == "duplicates":
        tokens = shape[-2]
        array = bell[..., random_bits((tokens,), seed + 1) % np.uint64(max(1, tokens // 3)), :] if tokens else bell
    elif kind == "near_ties":
        ones, twos = (np.full(shape, number).astype(number_type) for number in (1, 2))  # NumPy 2.0 widens ones * 2
        is_above = random_bits(shape, seed + 1) % np.uint64(5) == 0
        return np.where(is_above, np.nextafter(ones, twos), ones).astype(number_type)
    elif kind == "zeros":
        array = bell * (random_bits((*shape[:-1], 1), seed + 1) % np.uint64(2))
    elif kind == "huge":
        array = bell * (2.0**13 if dtype == "f16" else 2.0**122)
    elif kind == "tiny":
        array = bell * (2.0**-23 if dtype == "f16" else 2.0**-133)  # below the normal numbers
    elif kind == "smooth":
        array = np.cumsum(bell, axis=-2)
    else:
        array = bell
    return array.astype(number_type)


def attention_arrays(
    kind: str, lead: tuple[int, ...], group: int, tokens: int, dim: int, dtype: str, seed: int
) -> dict[str, np.ndarray]:
    """Query (*lead, group, dim), normal, with keys and values of one kind."""
    shapes = {"query": (*lead, group, dim), "keys": (*lead, tokens, dim), "values": (*lead, tokens, dim)}
    return {
        name: make_array("normal" if name == "query" else kind, shape, dtype, 3 * seed + i)
        for i, (name, shape) in enumerate(shapes.items())
    }


def some_counts(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Counts from 1 to 40, int64."""
    return 1 + (np.abs(make_array("normal", (*shape, 1), "f32", seed)[..., 0]) * 10).astype(np.int64)


def refused_arrays() -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Good keys (1, 8, 4), and the same with a NaN, with an infinity, and in a wrong dtype."""
    keys = make_array("normal", (1, 8, 4), "f32", 1)
    nan, infinite = keys.copy(), keys.copy()
    nan[0, 3, 1], infinite[0, 0, 0] = np.nan, np.inf
    return keys, {"nan": nan, "infinity": infinite, "float64": keys.astype(np.float64)}


def bell_shaped(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Numbers of standard deviation 1, at most 3.5, float64, with bits in every place: sums of four uniform numbers."""
    words = random_bits(shape, seed)
    pieces = [(words >> np.uint64(16 * i) & np.uint64(0xFFFF)).astype(np.float64) for i in range(4)]
    total = pieces[0] + pieces[1] + pieces[2] + pieces[3]
    return (total - 131070.0) / 2.0**15 * 0.8660254037844386


def random_bits(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """64 random bits each, uint64, by SplitMix64 (NumPy may change its own generators' streams)."""
    golden = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        z = (
            np.uint64(seed) * np.uint64(0xD1342543DE82EF95)
            + np.arange(1, np.prod(shape, dtype=int) + 1, dtype=np.uint64) * golden
        )
        z = (z ^ z >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ z >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return (z ^ z >> np.uint64(31)).reshape(shape)
