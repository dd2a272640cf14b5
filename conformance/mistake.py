"""A mistake that implementations make: a change of the reference.

It is either other code in one or two places of the reference, or the right code on other arguments. What explains a
wrong outcome is the mistake that gives it too (see `explaining`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .case import Case

__all__ = ["Mistake", "Patch"]

Patch = tuple[str, str, Any]  # module of the reference ("" is the package), name in it, what stands there instead


@dataclass(frozen=True)
class Mistake:
    """What is wrong in words that a kernel author can act on, the paragraph of SPECIFICATION.md, and how to make it."""

    cause: str
    rule: str
    patches: tuple[Patch, ...] = ()
    change: Callable[[Case], Case] = lambda case: case
    restore: Callable[[np.ndarray], np.ndarray] = lambda output: output  # after a change of the heads' order
