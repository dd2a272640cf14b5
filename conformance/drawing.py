"""Small numbers and arrays drawn by hypothesis, for counterexamples that can be checked by eye."""

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from .inputs import DTYPES

__all__ = ["Drawing"]

T = TypeVar("T")
# Simple numbers first, since examples shrink towards them. The others show rounding, near ties and overflow.
NUMBERS = (0.0, 1.0, -1.0, 2.0, -2.0, 3.0, -0.0, 0.1, 1.0 + 2.0**-23, 1e6, 1e-20, 1e20)
RATIOS = (1.0, 0.5, 0.75, 0.25, 0.2, 0.7)


class Drawing:
    """Draws of one case, whose arrays have the same dtype, dim and number of `heads`, up to the given ones."""

    def __init__(self, draw: st.DrawFn, dtype: str = "f32", most_dim: int = 3, most_heads: int = 1) -> None:
        self.draw = draw
        self.dtype: Any = DTYPES[dtype]
        self.dim = self.integer(1, most_dim)
        self.heads = self.integer(1, most_heads)

    def integer(self, least: int, most: int) -> int:
        return self.draw(st.integers(least, most))

    def integers(self, number: int, least: int, most: int) -> list[int]:
        return self.draw(st.lists(st.integers(least, most), min_size=number, max_size=number))

    def one_of(self, choices: Sequence[T]) -> T:
        return self.draw(st.sampled_from(choices))

    def ratio(self) -> float:
        return self.one_of(RATIOS)

    def rows(self, number: int) -> np.ndarray:
        """Keys or values (heads, number, dim)."""
        with np.errstate(over="ignore"):
            numbers = np.array(NUMBERS).astype(self.dtype).astype(np.float32)
        elements = st.sampled_from(numbers[np.isfinite(numbers)].tolist())
        return self.draw(arrays(np.float32, (self.heads, number, self.dim), elements=elements)).astype(self.dtype)

    def attention(self, tokens: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Query, keys and values, and perhaps a scale."""
        keys = self.rows(tokens)
        inputs = {"query": self.rows(self.integer(1, 2)), "keys": keys, "values": self.rows(tokens)}
        return inputs, self.one_of(({}, {"scale": 2.0}))

    def counts(self, number: int, least: int) -> np.ndarray:
        """Counts (heads, number): small ones, and one that float16 cannot represent."""
        numbers = st.sampled_from((*range(least, 4), 2049))
        lists = st.lists(numbers, min_size=number, max_size=number)
        return np.array([self.draw(lists) for _ in range(self.heads)])
