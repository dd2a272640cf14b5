"""The cases of the conformance suite: inputs for every public operation.

Expected results are not stored: the reference computes them, see `comparing`. Cases keep their names and numbers for
good, since others hold them as files (see `vectors`); new cases are added beside them.
"""

import functools
from collections.abc import Iterator

from .case import Case
from .operations import OPERATIONS

__all__ = ["all_cases"]


def all_cases(operations: tuple[str, ...] = tuple(OPERATIONS), seed: int = 0) -> Iterator[Case]:
    """Every case of `operations`, in their order; another `seed` gives them other numbers."""
    for operation in operations:
        yield from cases_of(operation, seed)


@functools.lru_cache(maxsize=64)
def cases_of(operation: str, seed: int) -> tuple[Case, ...]:
    return (*OPERATIONS[operation].cases(1_000 * seed), *OPERATIONS[operation].refused())
