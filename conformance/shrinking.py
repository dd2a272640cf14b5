"""The smallest counterexample that can be found: a few tokens, small numbers, to be checked by eye."""

import random
import warnings
from collections.abc import Callable

import hypothesis
from hypothesis import strategies as st
from hypothesis.errors import NoSuchExample

from .case import Case
from .drawing import Drawing
from .operations import OPERATIONS

__all__ = ["smallest_case"]

MOST_EXAMPLES = 400


def smallest_case(operation: str, fails: Callable[[Case], bool], seed: int) -> Case | None:
    """The simplest case of `operation` for which `fails` holds; None if none is found among some hundreds."""
    settings = hypothesis.settings(
        max_examples=MOST_EXAMPLES,
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of NumPy, about the largest and smallest numbers that are drawn
        try:
            return hypothesis.find(small_cases(operation), fails, settings=settings, random=random.Random(seed))
        except NoSuchExample:
            return None


@st.composite
def small_cases(draw: st.DrawFn, operation: str) -> Case:
    """A case of few tokens, one leading index or two heads."""
    return Case(operation, "smallest found", *OPERATIONS[operation].small(Drawing(draw)))
