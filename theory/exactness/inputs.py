"""Keys and tokens with which the claims of exactness are attacked."""

from collections.abc import Iterator

import numpy as np

__all__ = ["chunks_of_tokens", "keys_of_kinds", "near_ties"]


def keys_of_kinds(tokens: int, dim: int, seed: int) -> Iterator[np.ndarray]:
    """Keys (tokens, dim), float32: near ties, exact ties, cancellation, one huge feature, smooth ones."""
    rng = np.random.default_rng(seed)
    normal = rng.standard_normal((tokens, dim))
    steps = rng.integers(-2, 3, (tokens, dim))
    alternating = np.where(np.arange(dim) % 2, -1.0, 1.0) * rng.uniform(0.9, 1.1, (tokens, dim))
    yield normal.astype(np.float32)
    yield np.cumsum(normal, axis=0).astype(np.float32)
    yield np.sign(normal).astype(np.float32)
    yield (1 + steps * 2.0**-23).astype(np.float32)
    yield (normal[:1] * (1 + steps * 2.0**-20)).astype(np.float32)
    yield np.where(np.arange(tokens)[:, None] % 2, alternating, np.abs(alternating)).astype(np.float32)
    yield np.where(np.arange(dim) == dim // 2, 1e4, normal).astype(np.float32)
    yield (normal[rng.integers(0, max(1, tokens // 3), tokens)]).astype(np.float32)


def near_ties(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Sources (chunks, 12, dim) and destinations (chunks, 10, dim), float32, of every kind of keys."""
    keys = np.stack([kind for dim_seed in range(4) for kind in keys_of_kinds(22, 64, seed + dim_seed)])
    return keys[:, :12], keys[:, 12:]


def chunks_of_tokens(rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Chunks (tokens, dim), float32: ordinary, of every width of exponents, with zeros of both signs, subnormal."""
    normal = rng.standard_normal((64, 8))
    for width in (0, 4, 10, 20, 30, 60):
        yield (np.sign(normal) * 2.0 ** rng.uniform(0, width, normal.shape)).astype(np.float32)
    yield (normal * (rng.random(normal.shape) < 0.5)).clip(0).astype(np.float32) + np.float32(0)
    yield (normal * (rng.random(normal.shape) < 0.5)).astype(np.float32)
    yield (normal * 1e-40).astype(np.float32)
    yield normal.astype(np.float16).astype(np.float32)
    yield np.full((64, 8), -0.0, dtype=np.float32)
    yield np.zeros((64, 8), dtype=np.float32)
    yield np.array([[1], [1e30], [-1e30]], dtype=np.float32)
    for largest in (0.99 * 2.0**27, 0.99 * 2.0**28):  # just inside the condition, and outside by a factor of 2
        yield np.array([[largest]] * 5 + [[2 - 2.0**-23]] * 3, dtype=np.float32)
