"""Changes of cases: correct code called with other arguments is a mistake too."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from .case import Case

__all__ = ["changed", "flushed", "given", "shifted", "without"]


def without(name: str) -> Callable[[Case], Case]:
    """The same case without the parameter `name`."""
    return lambda case: replace(case, parameters={k: v for k, v in case.parameters.items() if k != name})


def given(**parameters: Any) -> Callable[[Case], Case]:
    """The same case with these parameters."""
    return lambda case: replace(case, parameters={**case.parameters, **parameters})


def shifted(name: str, by: int, default: int) -> Callable[[Case], Case]:
    """The same case with the parameter `name` larger by `by`, never below 0."""
    return lambda case: given(**{name: max(0, case.parameters.get(name, default) + by)})(case)


def changed(**arrays: Callable[[np.ndarray], np.ndarray]) -> Callable[[Case], Case]:
    """The same case with some of its arrays changed."""

    def change(case: Case) -> Case:
        changed_arrays = {name: arrays[name](x) if name in arrays else x for name, x in case.arrays.items()}
        return replace(case, arrays=changed_arrays)

    return change


def flushed(array: np.ndarray) -> np.ndarray:
    """Without subnormal numbers, of which zeros are left; those of float16 are not subnormal once they are float32."""
    wide = array.astype(np.float32)
    is_kept = (np.abs(wide) >= np.finfo(np.float32).tiny) | (wide == 0)
    return np.where(is_kept, wide, np.copysign(np.float32(0), wide)).astype(array.dtype)
