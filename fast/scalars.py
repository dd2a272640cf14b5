"""Checks of single numbers, in the words of the reference. Stored is what they return: Python's own numbers."""

import math
from collections.abc import Sequence
from numbers import Integral, Real

import torch

__all__ = [
    "check_integer",
    "check_keep_ratio",
    "check_keep_ratios",
    "check_number",
    "check_recent_share",
    "check_seed",
    "check_share",
    "check_whole_heads",
    "entries_of_chunk",
    "scale_of",
]

MOST = 2**62  # of any integer: two of them fit 64 bits, in which compiled code counts


def check_integer(name: str, value: int, least: int | None = None, most: int = MOST) -> int:
    """`value` as Python's own int, which never overflows; refuse what is not an integer from `least` to `most`."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if least is not None and value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    if value > most:
        raise ValueError(f"{name} must be at most {most}, got {value}")
    return int(value)


def check_seed(name: str, seed: int) -> int:
    """`seed` as Python's own int; refuse what is not an integer of 32 bits."""
    seed = check_integer(name, seed, least=0)
    if seed >= 2**32:
        raise ValueError(f"{name} must be below 2**32, got {seed}")
    return seed


def check_number(name: str, value: float) -> float:
    """`value` as Python's own float, infinite if it is too large for one; refuse what is not a real number."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    try:
        return float(value)
    except OverflowError:
        return math.inf


def check_keep_ratio(keep_ratio: float, name: str = "keep_ratio") -> float:
    """`keep_ratio` as Python's own float; refuse what is not a number in (0, 1]."""
    number = check_number(name, keep_ratio)
    if not 0 < number <= 1:
        raise ValueError(f"{name} must be in (0, 1], got {keep_ratio}")
    return number


def check_keep_ratios(keep_ratios: Sequence[float]) -> tuple[float, ...]:
    """A number in (0, 1] for each head; refuse anything else."""
    if isinstance(keep_ratios, str) or not isinstance(keep_ratios, Sequence) or not len(keep_ratios):
        raise TypeError(f"keep_ratios must be a sequence of numbers, one for each head, got {keep_ratios!r}")
    return tuple(check_keep_ratio(ratio, name="keep_ratios") for ratio in keep_ratios)


def check_recent_share(recent_share: float) -> float:
    """A number in [0, 0.5]: of two new tokens at most one may widen the recent window. Refuse anything else."""
    share = check_share("recent_share", recent_share)
    if share > 0.5:
        raise ValueError(f"recent_share must be at most 0.5, got {recent_share}")
    return share


def entries_of_chunk(keep_ratio: float, chunk_size: int) -> int:
    """Entries that a chunk of `chunk_size` tokens becomes: `ceil(keep_ratio * chunk_size)`, the product in float64."""
    return math.ceil(float(keep_ratio) * int(chunk_size))


def check_share(name: str, share: float) -> float:
    """`share` as Python's own float; refuse what is not a number in [0, 1]."""
    number = check_number(name, share)
    if not 0 <= number <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {share}")
    return number


def check_whole_heads(whole_heads: Sequence[int]) -> tuple[int, ...]:
    """Different indices of heads, ascending; refuse anything else."""
    if isinstance(whole_heads, str) or not isinstance(whole_heads, Sequence):
        raise TypeError(f"whole_heads must be a sequence of integers, got {whole_heads!r}")
    heads = [check_integer("whole_heads", head, least=0) for head in whole_heads]
    if len(set(heads)) < len(heads):
        raise ValueError(f"whole_heads must be different heads, got {heads}")
    return tuple(sorted(heads))


def scale_of(scale: float | None, query: torch.Tensor) -> float:
    """The factor of the logits, 1 / sqrt(dim) by default; refuses what is no finite number."""
    if scale is None:
        return float(query.shape[-1] ** -0.5)
    number = check_number("scale", scale)
    if not math.isfinite(number):
        raise ValueError(f"scale must be finite, got {scale}")
    return number
