"""Small numbers and arrays drawn by hypothesis, for counterexamples that can be checked by eye."""

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

__all__ = ["Drawing"]

T = TypeVar("T")
# Simple numbers first, since examples shrink towards them. The others show rounding, near ties and overflow.
NUMBERS = (0.0, 1.0, -1.0, 2.0, -2.0, 3.0, -0.0, 0.1, 1.0 + 2.0**-23, 1e6, 1e-20, 1e20)
RATIOS = (1.0, 0.5, 0.75, 0.25, 0.2, 0.7)


class Drawing:
    """Draws of one case, whose arrays have the same dim and one leading index, or two if there are two `heads`."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw = draw
        self.dim = self.integer(1, 3)
        self.heads = 1

    def integer(self, least: int, most: int) -> int:
        return self.draw(st.integers(least, most))

    def integers(self, number: int, least: int, most: int) -> list[int]:
        return self.draw(st.lists(st.integers(least, most), min_size=number, max_size=number))

    def one_of(self, choices: Sequence[T]) -> T:
        return self.draw(st.sampled_from(choices))

    def ratio(self) -> float:
        return self.one_of(RATIOS)

    def rows(self, number: int) -> np.ndarray:
        """Keys or values (heads, number, dim), float32."""
        elements = st.sampled_from([float(np.float32(x)) for x in NUMBERS])
        return self.draw(arrays(np.float32, (self.heads, number, self.dim), elements=elements))

    def attention(self, tokens: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Query, keys and values, and perhaps a scale."""
        keys = self.rows(tokens)
        inputs = {"query": self.rows(self.integer(1, 2)), "keys": keys, "values": self.rows(tokens)}
        return inputs, self.one_of(({}, {"scale": 2.0}))

    def counts(self, number: int, least: int) -> np.ndarray:
        """Counts (1, number): small ones, and one that float16 cannot represent."""
        numbers = st.sampled_from((*range(least, 4), 2049))
        return np.array([self.draw(st.lists(numbers, min_size=number, max_size=number))])
