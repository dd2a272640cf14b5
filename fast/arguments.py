"""Checks of arguments, in the words of the reference: every error names the argument, the rule and the value."""

import math
from numbers import Integral, Real

import torch

__all__ = [
    "check_append",
    "check_array",
    "check_finite",
    "check_half_range",
    "check_integer",
    "check_keep_ratio",
    "check_shape",
    "entries_of_chunk",
    "with_four_axes",
]

DTYPES = {torch.float16, torch.bfloat16, torch.float32}


def check_array(name: str, array: torch.Tensor) -> None:
    """Refuse what is not a finite float16, bfloat16 or float32 tensor `(..., tokens, dim)`, dim >= 1."""
    check_shape(name, array)
    check_finite(name, array)


def check_append(keys: torch.Tensor, values: torch.Tensor, held: tuple[torch.Tensor, ...] | None) -> None:
    """Refuse keys and values that do not fit each other, or what a cache holds: its keys and values, if any."""
    check_array("keys", keys)
    check_array("values", values)
    shapes = f"got values {tuple(values.shape)} and keys {tuple(keys.shape)}"
    if values.shape[:-1] != keys.shape[:-1]:
        raise ValueError(f"values must have the leading axes and tokens of keys, {shapes}")
    for name, new, old in zip(("keys", "values"), (keys, values), held or (), strict=False):
        if new.shape[:-2] != old.shape[:-2] or new.shape[-1] != old.shape[-1]:
            raise ValueError(f"{name} must fit what the cache holds, got {tuple(new.shape)} after {tuple(old.shape)}")
        if new.dtype != old.dtype:
            raise ValueError(f"{name} must have the dtype of the cache, {dtype_name(old)}, got {dtype_name(new)}")
        if new.device != old.device:
            raise ValueError(f"{name} must be on the device of the cache, {old.device}, got {new.device}")


def check_finite(name: str, array: torch.Tensor) -> None:
    """Refuse NaN and infinities. One of them leaves no sum finite; large finite numbers are looked at one by one."""
    if bool(torch.isfinite(array.sum(dtype=torch.float32))):
        return
    if not bool(torch.isfinite(array).all()):
        raise ValueError(f"{name} must be finite, got {int((~torch.isfinite(array)).sum())} NaN or infinite values")


def check_shape(name: str, array: torch.Tensor) -> None:
    """Refuse all else that `check_array` refuses."""
    if not isinstance(array, torch.Tensor):
        raise TypeError(f"{name} must be a torch tensor, got {type(array).__name__}")
    if array.dtype not in DTYPES:
        raise ValueError(f"{name} must be float16, bfloat16 or float32, got {dtype_name(array)}")
    if array.ndim < 2:
        raise ValueError(f"{name} must have shape (..., tokens, dim), got {tuple(array.shape)}")
    if array.shape[-1] < 1:
        raise ValueError(f"{name} must have dim >= 1, got shape {tuple(array.shape)}")


def with_four_axes(array: torch.Tensor) -> torch.Tensor:
    """`array` (..., rows, dim) as (batch, heads, rows, dim), the kernels' shape; other leading axes become heads."""
    return array if array.ndim == 4 else array.reshape(1, array.shape[:-2].numel(), *array.shape[-2:])


def dtype_name(array: torch.Tensor) -> str:
    """`float64`, not `torch.float64`."""
    return str(array.dtype).removeprefix("torch.")


def check_half_range(keys: torch.Tensor) -> None:
    """Refuse keys that less their mean might overflow float32."""
    half = torch.finfo(torch.float32).max / 2
    largest = float(keys.abs().max()) if keys.numel() else 0.0
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
    """Entries that a chunk of `chunk_size` tokens becomes: `ceil(keep_ratio * chunk_size)`, the product in float64."""
    return math.ceil(float(keep_ratio) * int(chunk_size))
