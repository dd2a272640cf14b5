"""Arrows point down: from the command to what measures to what computes, and nothing goes round in a circle."""

import graphlib
import itertools
import subprocess
import sys

import pytest
from sources import Module, imports, package_modules

from kvcluster import reference

# What a module may import beside its own room. A room is the longest of these names that a module's name begins with.
ROOMS = {
    "kvcluster": set(),
    "kvcluster.reference": set(),
    "kvcluster.pytest_plugin": set(),
    "kvcluster.conformance": {"kvcluster", "kvcluster.reference"},
    "kvcluster.fast": {"kvcluster"},
    "kvcluster.evaluation": {"kvcluster", "kvcluster.fast", "kvcluster.reference"},
    "kvcluster.theory": {"kvcluster", "kvcluster.evaluation", "kvcluster.fast", "kvcluster.reference"},
    "kvcluster.cli": {
        "kvcluster",
        "kvcluster.conformance",
        "kvcluster.evaluation",
        "kvcluster.fast",
        "kvcluster.reference",
    },
    "kvcluster.__main__": {"kvcluster.cli"},
}
# The same inside of fast: the names that users import, what chooses for them, three that compute, what these share.
STOREYS = {
    "kvcluster.fast.arguments": set(),
    "kvcluster.fast.scalars": set(),
    "kvcluster.fast.exact": {"arguments", "scalars"},
    "kvcluster.fast.plain": {"arguments", "scalars", "exact"},
    "kvcluster.fast.kernels": {"arguments", "scalars", "exact"},
    "kvcluster.fast.cpu": {"arguments", "scalars", "exact"},
    "kvcluster.fast.backends": {"arguments", "scalars", "exact", "plain", "kernels", "cpu"},
    "kvcluster.fast.memory": {"arguments", "scalars", "exact", "backends"},
    "kvcluster.fast": {"arguments", "scalars", "exact", "backends", "memory"},
    "kvcluster.fast.huggingface": {"", "arguments", "scalars", "exact", "backends", "memory"},
    "kvcluster.fast.vllm": {
        "",
        "arguments",
        "scalars",
        "exact",
        "backends",
        "memory",
        "cpu",
    },  # CPUs alone, and its own pages
}
STOREYS = {storey: {f"kvcluster.fast.{each}".rstrip(".") for each in below} for storey, below in STOREYS.items()}
# Beyond Python's own modules; rooms that are not named here may import anything that is no part of this repository.
BEYOND = {"kvcluster.reference": {"numpy", "jaxtyping"}, "kvcluster.pytest_plugin": set()}


def room_of(name, rooms):
    """The longest of `rooms` that contains a module, or None."""
    inside = [room for room in rooms if name == room or name.startswith(f"{room}.")]
    return max(inside, key=len, default=None)


def upward(modules, rooms):
    """Imports that `rooms` does not allow, as "importing -> imported"."""
    names = {module.name for module in modules}
    found = []
    for module in modules:
        here = room_of(module.name, rooms)
        for imported in sorted(imports(module, names)) if here else ():
            if room_of(imported, rooms) not in {None, here, *rooms[here]}:
                found.append(f"{module.name} -> {imported}")
    return found


def circles(modules):
    """Modules that import one another in a circle, the first of them again at the end; none if there is no circle."""
    names = {module.name for module in modules}
    imported = {module.name: imports(module, names) - {module.name} for module in modules}
    try:
        graphlib.TopologicalSorter(imported).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def foreign(modules):
    """What rooms import that may import little, as "importing -> imported"; and what no part of the package may."""
    found = []
    for module in modules:
        allowed = BEYOND.get(room_of(module.name, ROOMS))
        for imported in sorted(imports(module, {other.name for other in modules})):
            root = imported.partition(".")[0]
            is_own = root in ("kvcluster", *sys.stdlib_module_names)
            if root in ("benchmarks", "tests") or not (is_own or allowed is None or root in allowed):
                found.append(f"{module.name} -> {imported}")
    return found


MODULES = package_modules()


def test_every_room_is_there():
    """So that a rule of a room that was renamed does not hold for nothing."""
    rooms = {room_of(module.name, ROOMS) for module in MODULES}
    storeys = {room_of(module.name, STOREYS) for module in MODULES} - {None}
    assert rooms == set(ROOMS)
    assert storeys == set(STOREYS)


def test_arrows_between_rooms_point_down():
    assert upward(MODULES, ROOMS) == []


def test_arrows_inside_of_fast_point_down():
    assert upward(MODULES, STOREYS) == []


def test_nothing_goes_round_in_a_circle():
    assert circles(MODULES) == []


def test_the_reference_names_numpy_and_jaxtyping_only():
    assert foreign(MODULES) == []


@pytest.mark.parametrize(
    ("name", "line", "rooms"),
    [
        ("kvcluster.evaluation.timing", "from kvcluster.cli import main", ROOMS),
        ("kvcluster.fast.cache", "from .. import reference", ROOMS),
        ("kvcluster.fast.cache", "def f():\n    import kvcluster.evaluation.machine", ROOMS),
        ("kvcluster.reference.cache", "from ..fast.cache import ClusteredCache", ROOMS),
        ("kvcluster.conformance.suite", "from kvcluster import fast", ROOMS),
        ("kvcluster.conformance.operations.merge", "from ...evaluation import timing", ROOMS),
        ("kvcluster.evaluation.timing", "from ..theory.claims import Claim", ROOMS),
        ("kvcluster.reference.cache", "from kvcluster import __version__", ROOMS),
        ("kvcluster.fast.exact.similarity", "from ..plain import assignment", STOREYS),
        ("kvcluster.fast.exact.similarity", "from ..merging import Clustering", STOREYS),
        ("kvcluster.fast.plain.attention", "from ..kernels.match import match", STOREYS),
        ("kvcluster.fast.kernels.match", "from .. import cpu", STOREYS),
        ("kvcluster.fast.cpu.paged", "from ..backends import choose_backend", STOREYS),
        ("kvcluster.fast.backends", "from .cache import ClusteredCache", STOREYS),
        ("kvcluster.fast.memory.work", "from ..cache import ClusteredCache", STOREYS),
        ("kvcluster.fast.cache", "from .kernels.match import match", STOREYS),
        ("kvcluster.fast.cache", "from .huggingface import ClusteredCache", STOREYS),
        ("kvcluster.fast.huggingface.cache", "from ..vllm import register", STOREYS),
    ],
    ids=itertools.count(),
)
def test_an_import_upward_is_found(name, line, rooms):
    others = [Module("kvcluster.fast", "", is_package=True), *(Module(other, "") for other in (*ROOMS, *STOREYS))]
    modules = [*(other for other in others if other.name != name), Module(name, line)]
    assert [each.partition(" -> ")[0] for each in upward(modules, rooms)] == [name]
    assert upward([Module(name, f"if TYPE_CHECKING:\n    {line.splitlines()[-1].strip()}")], rooms) == []


def test_an_import_downward_is_none_upward():
    modules = [
        Module("kvcluster.cli.demo", "def demo():\n    from kvcluster.evaluation.demo.run import run_demo"),
        Module("kvcluster.fast.cache", "from . import backends\nfrom .memory.work import ClusteringWork"),
        Module("kvcluster.fast.backends", "from .kernels import match\nfrom .exact import similarity"),
        Module(
            "kvcluster.fast.exact", "from .similarity import matches\nfrom ..arguments import check", is_package=True
        ),
    ]
    assert upward(modules, ROOMS) == upward(modules, STOREYS) == []


def test_a_circle_is_found():
    lines = {"a.b": "from . import c", "a.c": "def f():\n    from a.d import g", "a.d": "import a.b"}
    ring = [Module(name, line) for name, line in lines.items()]
    assert set(circles(ring)) == {"a.b", "a.c", "a.d"}
    assert circles(ring[:2]) == []


def test_a_foreign_import_is_found():
    named = "import os, numpy as np\nfrom jaxtyping import Float\nfrom . import merging\n"
    assert foreign([Module("kvcluster.reference.cache", named)]) == []
    assert foreign([Module("kvcluster.reference.cache", named + "def f():\n    import torch.linalg")]) == [
        "kvcluster.reference.cache -> torch.linalg"
    ]
    assert foreign([Module("kvcluster.cli.bench", "import torch\nfrom benchmarks.recall import run")]) == [
        "kvcluster.cli.bench -> benchmarks.recall"
    ]


@pytest.mark.parametrize("name", reference.__all__)
def test_a_public_name_of_the_reference_has_its_module_in_fast(name):
    module = getattr(reference, name).__module__.replace("reference", "fast")
    assert module in {each.name for each in MODULES}


def in_fresh_interpreter(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


IMPORTS_ONLY_NUMPY = """
import importlib, pkgutil, sys
import kvcluster.reference
for module in pkgutil.iter_modules(kvcluster.reference.__path__):
    importlib.import_module(f"kvcluster.reference.{module.name}")
files = {name.partition(".")[0]: getattr(module, "__file__", None) or "" for name, module in sys.modules.items()}
installed = {root for root, file in files.items() if "site-packages" in file and not root.startswith("_")}
beyond = installed - {"numpy", "jaxtyping", "wadler_lindig"}  # jaxtyping imports wadler_lindig
assert not beyond, beyond
"""


def test_the_reference_imports_numpy_and_jaxtyping_only():
    done = in_fresh_interpreter(IMPORTS_ONLY_NUMPY)
    assert done.returncode == 0, done.stderr
    assert in_fresh_interpreter("import rich\n" + IMPORTS_ONLY_NUMPY).returncode != 0


@pytest.mark.slow
def test_fast_never_imports_the_reference():
    code = "import sys, kvcluster.fast.huggingface\nassert not [m for m in sys.modules if 'kvcluster.ref' in m]"
    assert in_fresh_interpreter(code).returncode == 0
    assert in_fresh_interpreter("import kvcluster.reference\n" + code).returncode != 0
