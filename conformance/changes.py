"""Changes of cases: the right code on other arguments is a mistake too."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from .case import Case

__all__ = ["changed", "given", "shifted", "without"]


def without(name: str) -> Callable[[Case], Case]:
    """The same case, `name` not given."""
    return lambda case: replace(case, parameters={k: v for k, v in case.parameters.items() if k != name})


def given(**parameters: Any) -> Callable[[Case], Case]:
    """The same case with these parameters."""
    return lambda case: replace(case, parameters={**case.parameters, **parameters})


def shifted(name: str, by: int, default: int) -> Callable[[Case], Case]:
    """The same case, `name` by so much larger."""
    return lambda case: given(**{name: max(0, case.parameters.get(name, default) + by)})(case)


def changed(**arrays: Callable[[np.ndarray], np.ndarray]) -> Callable[[Case], Case]:
    """The same case with some of its arrays changed."""

    def change(case: Case) -> Case:
        made = {name: arrays[name](x) if name in arrays else x for name, x in case.arrays.items()}
        return replace(case, arrays=made)

    return change
