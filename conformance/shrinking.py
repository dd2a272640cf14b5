"""The smallest counterexample that can be found: a few tokens, small numbers, to be checked by eye."""

import random
import warnings
from collections.abc import Callable
from typing import Any

import hypothesis
from hypothesis import strategies as st
from hypothesis.errors import NoSuchExample

from .case import Case
from .drawing import Drawing
from .inputs import DTYPES
from .operations import OPERATIONS

__all__ = ["smallest_case"]

MOST_EXAMPLES = 400
MOST_DIM, MOST_HEADS = 130, 3


def smallest_case(like: Case, fails: Callable[[Case], bool], seed: int) -> Case | None:
    """The simplest case of an operation for which `fails` holds; None if none is found among some hundreds.

    First of float32 numbers in one head and up to three dims, then of the dtype, then also of the dim of the case
    `like`, in several heads.
    """
    floats = [array for array in like.arrays.values() if array.dtype in DTYPES.values()]
    names = [name for name, dtype in DTYPES.items() if any(array.dtype == dtype for array in floats)]
    dtype = names[0] if names else "f32"
    dim = min(MOST_DIM, max((array.shape[-1] for array in floats), default=3))
    larger: dict[str, Any] = {"dtype": dtype, "most_heads": 2}
    for sizes in ({}, larger, {**larger, "most_heads": MOST_HEADS, "most_dim": dim}):
        found = smallest(small_cases(like.operation, sizes), fails, seed, MOST_EXAMPLES // (1 + len(sizes)))
        if found is not None or not floats:
            return found
    return None


def smallest(cases: st.SearchStrategy[Case], fails: Callable[[Case], bool], seed: int, number: int) -> Case | None:
    """The simplest of so many for which `fails` holds."""
    settings = hypothesis.settings(
        max_examples=number,
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of NumPy, about the largest and smallest numbers that are drawn
        try:
            return hypothesis.find(cases, fails, settings=settings, random=random.Random(seed))
        except NoSuchExample:
            return None


@st.composite
def small_cases(draw: st.DrawFn, operation: str, sizes: dict[str, Any]) -> Case:
    """A case of few tokens."""
    return Case(operation, "smallest found", *OPERATIONS[operation].small(Drawing(draw, **sizes)))
