"""The cases of the conformance suite: for every public operation, what goes in.

What must come out is not stored: the reference says it, see `comparing`. Cases keep their name and their numbers
for good, since others hold them as files (see `vectors`): new ones come beside them.
"""

import functools
from collections.abc import Iterator

from .case import Case
from .operations import OPERATIONS

__all__ = ["all_cases"]


def all_cases(operations: tuple[str, ...] = tuple(OPERATIONS), seed: int = 0) -> Iterator[Case]:
    """Every case of `operations`, in their order; another `seed` puts other numbers into them."""
    for operation in operations:
        yield from cases_of(operation, seed)


@functools.lru_cache(maxsize=64)
def cases_of(operation: str, seed: int) -> tuple[Case, ...]:
    return (*OPERATIONS[operation].cases(1_000 * seed), *OPERATIONS[operation].refused())
