"""An implementation under test: anybody's module with some of the public names."""

import difflib
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn, Protocol
from unittest.mock import patch

import numpy as np

from kvcluster import reference

from .case import Case
from .guard import Guard
from .inputs import DTYPES
from .operations import OPERATIONS
from .port import Outcome, Port, parameters_of
from .raised import Raised

__all__ = ["Implementation", "Subject", "load_implementation", "run"]

SETTINGS = ("ARRAYS", "DTYPES", "REFUSES", "SUBNORMALS", "from_numpy", "to_numpy")
ALIKE = 0.85  # how alike a mistyped name is, at least


class Subject(Protocol):
    """What the suite asks; an `Implementation`, here or in another process."""

    name: str
    operations: tuple[str, ...]
    dtypes: tuple[str, ...]

    def answer(self, case: Case) -> Outcome: ...


class Implementation(Port):
    """A `Port` that is checked in the operations that it has; `operations` are their names.

    With `REFUSES = False` it is not asked to refuse bad input, with `SUBNORMALS = False` it gets no subnormal numbers.

    Raises
    ------
    ValueError : a setting is something else.
    """

    def __init__(self, namespace: Any, name: str | None = None, guard: Guard | None = None) -> None:
        super().__init__(namespace, name)
        self.operations = tuple(name for name in OPERATIONS if hasattr(namespace, name))
        self.refuses, self.has_subnormals = (switch(namespace, name) for name in ("REFUSES", "SUBNORMALS"))
        self.guard = guard or Guard()

    def answer(self, case: Case) -> Outcome:
        """What it gives for a case, if that is put to it.

        Raises
        ------
        DisturbedError : it changed the arithmetic that it is compared with.
        """
        reason = self.accepts(case)
        if reason is not None:
            return Outcome({}, skipped=reason)
        outcome = run(self, case)
        self.guard.check(f"{case.operation} {case.name}")
        return outcome

    def accepts(self, case: Case) -> str | None:
        """Why the case cannot be put to this implementation; None if it can."""
        if case.operation not in self.operations:
            return "no such name"
        if case.is_refused and not self.refuses:
            return "REFUSES = False"
        used = {name for name, dtype in DTYPES.items() if any(array.dtype == dtype for array in case.arrays.values())}
        if not used <= set(self.dtypes):
            return f"dtype {', '.join(sorted(used - set(self.dtypes)))}"
        if not self.has_subnormals and any(map(has_subnormal, case.arrays.values())):
            return "SUBNORMALS = False"
        operation = OPERATIONS[case.operation]
        function, parameters = operation.spelling(self, case)
        known, takes_others = parameters_of(function)
        missing = sorted((set(parameters) | set(operation.by_name) & set(case.arrays)) - known)
        if missing and not takes_others:
            return f"no parameter {', '.join(missing)}"
        attend = getattr(function, "attend", None)  # of a cache
        if attend is not None and "scale" in case.parameters:
            known, takes_others = parameters_of(attend)
            if "scale" not in known and not takes_others:
                return "no parameter scale of attend"
        return None


def switch(namespace: Any, name: str) -> bool:
    value = getattr(namespace, name, True)
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")
    return value


def has_subnormal(array: np.ndarray) -> bool:
    """Whether any number is subnormal in its own dtype, or in float32."""
    if array.dtype.kind not in "fV":
        return False
    sizes = np.abs(array.astype(np.float64))
    least = 2.0**-14 if array.dtype == np.float16 else 2.0**-126
    return bool(((sizes > 0) & (sizes < least)).any())


def run(port: Port, case: Case) -> Outcome:
    """The outcome of a case with any port."""
    operation = OPERATIONS[case.operation]
    try:
        with leaving_is_told():
            return Outcome(operation.call(operation, port, case))
    except NotImplementedError as error:
        return Outcome({}, skipped=f"NotImplementedError {error}".strip())
    except SystemExit as error:
        return Outcome({}, ended=f"left by {error if isinstance(error, LeftError) else f'sys.exit({error.code})'}")
    except MemoryError:
        return Outcome({}, ended="ran out of memory")
    except Exception as error:  # whatever an unknown implementation raises is reported
        return Outcome({}, Raised.of(error))


class LeftError(SystemExit):
    """The process was to end at once."""


@contextmanager
def leaving_is_told() -> Iterator[None]:
    """Let nobody end this process before anything is said; those that are forked meanwhile may end."""
    at_once, number = os._exit, os.getpid()

    def leave(code: int) -> NoReturn:
        if os.getpid() != number:
            at_once(code)
        raise LeftError(f"os._exit({code})")

    with patch.object(os, "_exit", leave):
        yield


def load_implementation(target: str) -> Implementation:
    """The implementation that `package.module` or a path to a .py file names.

    The folder of a file, or the current one, stays in `sys.path`: modules may be imported as late as in a call.

    Raises
    ------
    ImportError : it cannot be imported, or has none of the public names, or one that is nearly one of them.
    ValueError : a setting of it is something else than can be.
    DisturbedError : it changed the arithmetic that it is compared with when it was imported.
    """
    guard = Guard()
    with leaving_is_told():
        module = module_of_file(target) if target.endswith(".py") else module_of_name(target)
    guard.check(f"the import of {target}")
    if mistyped := list(mistyped_names(module)):
        raise ImportError(f"target must have names of kvcluster, got {'; '.join(mistyped)}")
    implementation = Implementation(module, target, guard)
    if not implementation.operations:
        raise ImportError(f"target must have one of {', '.join(OPERATIONS)}, got {target!r} without any")
    return implementation


def module_of_name(target: str) -> ModuleType:
    if "" not in sys.path:
        sys.path.insert(0, "")
    return importlib.import_module(target)


def module_of_file(target: str) -> ModuleType:
    path = Path(target).resolve()
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise ImportError(f"target must be a module or a .py file, got {target!r}")
    module = importlib.util.module_from_spec(spec)
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    spec.loader.exec_module(module)
    return module


def mistyped_names(module: ModuleType) -> Iterator[str]:
    """Its own public names that are nearly one of ours which it does not have; private ones are its own business."""
    absent = [name for name in (*OPERATIONS, *SETTINGS) if not hasattr(module, name)]
    for name, value in vars(module).items():
        is_setting = name.isupper()
        is_own = is_setting or getattr(value, "__module__", None) == module.__name__
        if name.startswith("_") or not is_own or hasattr(reference, name) or name in SETTINGS:
            continue
        for near in difflib.get_close_matches(name, absent, 1, ALIKE):
            if near.isupper() == is_setting:
                yield f"{name}, which is nearly {near}; _{name} if that is meant"
