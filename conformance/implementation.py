"""An implementation under test: anybody's module with some of the public names."""

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

from .case import Case
from .inputs import DTYPES
from .operations import OPERATIONS
from .port import Outcome, Port, parameters_of

__all__ = ["Implementation", "load_implementation", "run"]


class Implementation(Port):
    """A `Port` that is checked in the operations that it has; `operations` are their names."""

    def __init__(self, namespace: Any, name: str | None = None) -> None:
        super().__init__(namespace, name)
        self.operations = tuple(name for name in OPERATIONS if hasattr(namespace, name))

    def accepts(self, case: Case) -> str | None:
        """Why the case cannot be put to this implementation; None if it can."""
        if case.operation not in self.operations:
            return "no such name"
        used = {name for name, dtype in DTYPES.items() if any(array.dtype == dtype for array in case.arrays.values())}
        if not used <= set(self.dtypes):
            return f"dtype {', '.join(sorted(used - set(self.dtypes)))}"
        operation = OPERATIONS[case.operation]
        function, parameters = operation.spelling(self, case)
        known, takes_others = parameters_of(function)
        missing = sorted((set(parameters) | set(operation.by_name) & set(case.arrays)) - known)
        return f"no parameter {', '.join(missing)}" if missing and not takes_others else None


def run(port: Port, case: Case) -> Outcome:
    """The outcome of a case with any port."""
    operation = OPERATIONS[case.operation]
    try:
        return Outcome(operation.call(operation, port, case))
    except (Exception, SystemExit) as error:  # whatever an unknown implementation raises is reported
        return Outcome({}, error)


def load_implementation(target: str) -> Implementation:
    """The implementation that `package.module` or a path to a .py file names.

    Raises
    ------
    ImportError : it cannot be imported, or has none of the public names.
    """
    if target.endswith(".py"):
        path = Path(target).resolve()
        spec = importlib.util.spec_from_file_location(path.stem, path)
        if not path.is_file() or spec is None or spec.loader is None:
            raise ImportError(f"target must be a module or a .py file, got {target!r}")
        module = importlib.util.module_from_spec(spec)
        sys.path.insert(0, str(path.parent))  # its own imports
        try:
            spec.loader.exec_module(module)
        finally:
            sys.path.remove(str(path.parent))
    else:
        sys.path.insert(0, "")
        try:
            module = importlib.import_module(target)
        finally:
            sys.path.remove("")
    implementation = Implementation(module, target)
    if not implementation.operations:
        raise ImportError(f"target must have one of {', '.join(OPERATIONS)}, got {target!r} without any")
    return implementation
