"""How one mistake is put into the fast path."""

import functools
import importlib
import inspect
import itertools
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from kvcluster.fast.backends import TABLE, cell

Patch = Callable[[pytest.MonkeyPatch], None]

# Places of mistakes that C++ would not make, since it matches and merges by itself.
WITHOUT_CPP = ("plain/soft_matching.", "exact/chunks.", "exact/mean.", "exact/similarity.")

for operation, backend in itertools.product(TABLE, ("torch", "cpp")):
    cell(operation, backend)  # imported now: what is imported while a mistake is in place keeps it


@dataclass(frozen=True)
class Mutant:
    """A mistake, the public names that answer wrongly with it, first the one where it is made, and what makes it."""

    name: str
    operations: tuple[str, ...]
    patch: Patch


def put(mistake: Callable, *places: str) -> Patch:
    """A patch of each "folder/module.Class.name" or public ".name"; `mistake` is given what was there first."""

    def patch(monkeypatch):
        if any(place.startswith(WITHOUT_CPP) for place in places):
            monkeypatch.setattr("kvcluster.fast.backends.has_cpp", lambda name: False)
        for place in places:
            module, *classes, name = place.split(".")
            # not fast.kmeans, which is a function
            owner = importlib.import_module(f"kvcluster.fast.{module.replace('/', '.')}".rstrip("."))
            owner = functools.reduce(getattr, classes, owner)
            held = getattr(owner, name)
            right = getattr(held, "fget", held)  # of a property

            def made(*arguments, right=right, **named):
                return mistake(right, *arguments, **named)

            monkeypatch.setattr(owner, name, property(made) if isinstance(held, property) else made)

    return patch


def together(*patches: Patch) -> Patch:
    return lambda monkeypatch: [patch(monkeypatch) for patch in patches]


def made_with(place: str, **changes: Callable) -> Patch:
    """A class made with other parameters than it was given, each a function of the given ones."""

    def init(right, held, **given):
        right(held, **given | {name: change(given) for name, change in changes.items()})

    return put(init, f"{place}.__init__")


def twin_of(module: types.ModuleType, *changes: tuple[str, str]) -> dict[str, Any]:
    """The names of `module` with other words in the place of some, which its source then has once."""
    source = inspect.getsource(module)
    for right, wrong in changes:
        assert source.count(right) == 1, right
        source = source.replace(right, wrong)
    twin = {"__name__": module.__name__, "__package__": module.__package__}
    exec(compile(source, module.__name__, "exec"), twin)
    return twin
