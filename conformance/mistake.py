"""A mistake that implementations make: a change of the reference.

It is either other code in one or two places of the reference, or the right code on other arguments.
"""

import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from unittest.mock import patch

import numpy as np

from kvcluster import reference

from .case import Case
from .implementation import Implementation, Outcome, run
from .wrong_parts import Patch

__all__ = ["Mistake"]


@dataclass(frozen=True)
class Mistake:
    """What is wrong in words that a kernel author can act on, the paragraph of SPECIFICATION.md, and how to make it."""

    cause: str
    rule: str
    operations: tuple[str, ...]
    patches: tuple[Patch, ...] = ()
    change: Callable[[Case], Case] = lambda case: case
    restore: Callable[[np.ndarray], np.ndarray] = lambda output: output  # after a change of the heads' order

    def outcome(self, case: Case) -> Outcome:
        """What the reference gives with this mistake."""
        with ExitStack() as stack:
            for module, name, part in self.patches:
                place = sys.modules[f"kvcluster.reference.{module}".rstrip(".")]
                stack.enter_context(patch.object(place, name, part))
            made = run(Implementation(reference), self.change(case))
        if "output" in made.arrays:
            made.arrays["output"] = self.restore(made.arrays["output"])
        return made
