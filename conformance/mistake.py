"""A mistake that implementations make: a change of the reference.

It either puts other code in one or two places of the reference, or calls the right code with other arguments. A wrong
outcome is explained by the mistake that gives it too (see `explaining`).
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
