"""Rotary position embedding (RoPE): a key is turned by an angle that grows with its position.

arXiv:2104.09864; the variants for long contexts and the pairing of features are those of transformers' Llama.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, Float64

__all__ = ["rope_frequencies", "rotate"]


def rope_frequencies(
    head_dim: int, *, theta: float, scaling: Mapping[str, Any] | None = None
) -> Float32[np.ndarray, " half_dim"]:
    """Radians per position of each pair of features, float32 as in transformers.

    Parameters
    ----------
    head_dim : features of a head, even.
    theta : base; the slowest pair turns once in about `2 * pi * theta` positions.
    scaling : `rope_scaling` or `rope_parameters` of a `config.json`.

    Notes
    -----
    Variants: `default`; `linear` (long Llama 2 models), all slowed by `factor`; `llama3`, where only wavelengths
    that the original context did not cover are slowed, with a smooth transition between.

    Raises
    ------
    ValueError : another variant.
    """
    scaling = scaling or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = 1 / np.float32(theta) ** exponents  # (half_dim,)
    if kind == "default":
        return frequencies
    if kind == "linear":
        return frequencies / np.float32(scaling["factor"])
    if kind == "llama3":
        turns = scaling["original_max_position_embeddings"] * frequencies / (2 * np.pi)  # in the original context
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        keep = np.clip((turns - low) / (high - low), 0, 1)  # 1: fast pairs, as they are; 0: slow pairs
        return ((1 - keep) * frequencies / scaling["factor"] + keep * frequencies).astype(np.float32)
    raise ValueError(f"rope_type must be 'default', 'linear' or 'llama3', got {kind!r}")


def rotate(
    x: Float[np.ndarray, "heads tokens dim"], positions: np.ndarray, frequencies: Float[np.ndarray, " half_dim"]
) -> Float64[np.ndarray, "heads tokens dim"]:
    """Rotary position embedding: features `i` and `i + dim / 2` turned by `position * frequency[i]`."""
    # float32 angles, as in transformers: at position 4,096 their rounding alone is 2e-4 radians.
    angles = (positions[:, None].astype(np.float32) * frequencies).astype(np.float64)  # (tokens, half_dim)
    cos, sin = np.cos(angles), np.sin(angles)
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
