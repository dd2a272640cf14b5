"""One file holds all of an operation; a port may spell methods and budgets as version 0.2 does, or as 0.1 did."""

import ast
import types
from pathlib import Path

import numpy as np
import pytest

from kvcluster import conformance, reference
from kvcluster.conformance import OPERATIONS, Case, Implementation, check
from kvcluster.conformance.counterexamples import differs
from kvcluster.conformance.operations import OPERATIONS as KNOWN
from kvcluster.conformance.scaffold import scaffold

FOLDER = Path(conformance.__file__).parent


def test_no_other_file_knows_an_operation_by_name():
    named = {
        (path.name, node.value)
        for path in FOLDER.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and node.value in OPERATIONS
    }
    assert named == set()
    assert len(list((FOLDER / "operations").glob("*.py"))) == len(OPERATIONS) + 1


def test_sections_and_scaffold_are_of_all_operations():
    assert sorted(operation.section for operation in KNOWN.values()) == [*range(3, 14), 16, 17, 18, 19, 20]
    text = scaffold("my_adapter.py")
    compile(text, "my_adapter.py", "exec")
    assert all(f"def {name}(" in text or f"# {name} = " in text for name in OPERATIONS)
    assert all(f"# {name} = " in text for name in ("Distinctive", "BoundedCache"))


class As01(reference.ClusteredCache):
    """Method and budget are switches of one class."""

    def __new__(cls, *, keep_ratio, chunk_size=256, n_sink=16, n_recent=64, budget=None, n_shared=None):
        rules = {"keep_ratio": keep_ratio, "chunk_size": chunk_size, "n_sink": n_sink, "n_recent": n_recent}
        if budget is not None and n_shared is not None:
            raise ValueError("not together")
        if budget is not None:
            return reference.BoundedCache(**rules, budget=budget)
        method = reference.SoftMatching() if n_shared is None else reference.Distinctive(n_shared)
        return reference.ClusteredCache(**rules, method=method)

    def __init__(self, **parameters):
        pass


class WithPlainMethods(reference.ClusteredCache):
    """Any object that has `n_shared` is a method."""

    def __init__(self, *, keep_ratio, method=None, chunk_size=256, n_sink=16, n_recent=64):
        method = reference.SoftMatching() if method is None else reference.Distinctive(method.n_shared)
        rules = {"chunk_size": chunk_size, "n_sink": n_sink, "n_recent": n_recent}
        super().__init__(keep_ratio=keep_ratio, method=method, **rules)


LATER = {f"no parameter {name}" for name in ("whole_heads", "recent_share", "bits")}
PORTS = {
    "0.2": ({"BoundedCache": reference.BoundedCache, "Distinctive": reference.Distinctive}, set()),
    "0.1": ({"ClusteredCache": As01}, LATER),
    "no budget": ({"Distinctive": reference.Distinctive}, {"no parameter budget"}),
    "no budget, no own method": (
        {"ClusteredCache": WithPlainMethods},
        {"no parameter budget", *LATER},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("port", PORTS)
def test_either_spelling_agrees(port):
    names, missing = PORTS[port]
    namespace = types.SimpleNamespace(**{"ClusteredCache": reference.ClusteredCache} | names)
    report = check(Implementation(namespace), only=("ClusteredCache",), has_smallest=False)
    assert report.agrees, report.operations
    assert {reason.split(",")[0] for reason in report.operations[0].skipped} == missing


class Unbounded(reference.ClusteredCache):
    """Takes a budget, and forgets it."""

    def __init__(self, *, budget, **rules):
        super().__init__(**rules)


@pytest.mark.slow
def test_a_wrong_bounded_cache_is_caught_and_its_cause_named():
    namespace = types.SimpleNamespace(**vars(reference) | {"BoundedCache": Unbounded})
    found = check(Implementation(namespace), only=("ClusteredCache",)).operations[0].counterexample
    assert found.cause == "budget is ignored: spans are merged until it is kept"
    assert found.rule == "9.11"
    assert "budget" in found.case.parameters


def test_a_method_is_written_as_its_parameters():
    cases = {case.name: case for case in KNOWN["ClusteredCache"].cases(0)}
    case = cases["shared-in-batch-rows"]
    assert str(case.parameters["method"]) == "Distinctive(n_shared=3)"
    written = {"keep_ratio": 0.4, "chunk_size": 20, "n_sink": 3, "n_recent": 9, "n_shared": 3, "pieces": [100, 10]}
    assert case.written_parameters == written


def test_where_the_baseline_overflows_the_right_answer_is_no_counterexample():
    """1e20 * 1e20 is beyond float32."""
    large, one = np.full((1, 1, 1), 1e20, np.float32), np.ones((1, 1, 1), np.float32)
    case = Case("attention", "large", {"query": large, "keys": large, "values": one})
    for answer, is_wrong in ((one, False), (one * 0, True)):
        namespace = types.SimpleNamespace(attention=lambda *arrays, answer=answer: answer)
        assert differs(Implementation(namespace), case) == is_wrong
