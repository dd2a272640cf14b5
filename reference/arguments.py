"""Checks of arguments: every error names the argument, the rule and the value that broke it."""

import math
from numbers import Integral, Real

import numpy as np

__all__ = ["check_append", "check_array", "check_half_range", "check_integer", "check_keep_ratio", "entries_of_chunk"]

# All three are exactly representable in float32; NumPy knows bfloat16 through the package ml_dtypes.
DTYPES = ("float16", "bfloat16", "float32")


def check_array(name: str, array: np.ndarray) -> None:
    """Refuse what is not a finite float16, bfloat16 or float32 array `(..., tokens, dim)`, dim >= 1."""
    if not isinstance(array, np.ndarray):
        raise TypeError(f"{name} must be a NumPy array, got {type(array).__name__}")
    if array.dtype.name not in DTYPES:
        raise ValueError(f"{name} must be float16, bfloat16 or float32, got {array.dtype.name}")
    if array.ndim < 2:
        raise ValueError(f"{name} must have shape (..., tokens, dim), got {array.shape}")
    if array.shape[-1] < 1:
        raise ValueError(f"{name} must have dim >= 1, got shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite, got {int((~np.isfinite(array)).sum())} NaN or infinite values")


def check_append(keys: np.ndarray, values: np.ndarray, held: tuple[np.ndarray | None, np.ndarray | None]) -> None:
    """Refuse keys and values that do not fit each other, or the keys and values that a cache holds, if any."""
    check_array("keys", keys)
    check_array("values", values)
    if values.shape[:-1] != keys.shape[:-1]:
        raise ValueError(
            f"values must have the leading axes and tokens of keys, got values {values.shape} and keys {keys.shape}"
        )
    for name, new, old in zip(("keys", "values"), (keys, values), held, strict=True):
        if old is not None and (new.shape[:-2] != old.shape[:-2] or new.shape[-1] != old.shape[-1]):
            raise ValueError(f"{name} must fit what the cache holds, got {new.shape} after {old.shape}")
        if old is not None and new.dtype != old.dtype:
            raise ValueError(f"{name} must have the dtype of the cache, {old.dtype.name}, got {new.dtype.name}")


def check_half_range(keys: np.ndarray) -> None:
    """Refuse keys that less their mean might overflow float32."""
    half = float(np.finfo(np.float32).max) / 2
    largest = float(np.abs(keys.astype(np.float64)).max(initial=0))
    if largest > half:
        raise ValueError(f"keys must be at most {half:.3g} in size with is_centred, got {largest:.3g}")


def check_integer(name: str, value: int, least: int) -> None:
    """Refuse what is not an integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def check_keep_ratio(keep_ratio: float) -> None:
    """Refuse what is not a number in (0, 1]."""
    if isinstance(keep_ratio, bool) or not isinstance(keep_ratio, Real):
        raise TypeError(f"keep_ratio must be a number, got {keep_ratio!r}")
    if not 0 < keep_ratio <= 1:
        raise ValueError(f"keep_ratio must be in (0, 1], got {keep_ratio}")


def entries_of_chunk(keep_ratio: float, chunk_size: int) -> int:
    """Entries that a chunk of `chunk_size` tokens becomes: `ceil(keep_ratio * chunk_size)`.

    The product is the float64 one, so every language with IEEE arithmetic finds the same number.
    """
    return math.ceil(float(keep_ratio) * int(chunk_size))
