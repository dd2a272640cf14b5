"""A backend's name is compared in fast/backends.py only; everywhere else it is passed on."""

import ast
import itertools

import pytest
from sources import files

BACKENDS = {"torch", "triton", "cpp"}


def comparisons(source):
    """The expressions and patterns of a source that tell backends apart by their names."""
    nodes = ast.walk(ast.parse(source))
    places = [node for node in nodes if isinstance(node, ast.Compare | ast.MatchValue)]
    strings = {node: {each.value for each in ast.walk(node) if isinstance(each, ast.Constant)} for node in places}
    return [ast.unparse(node) for node, words in strings.items() if words & BACKENDS]


def test_backends_are_told_apart_in_one_file():
    sources = {name: text for name, text in files(".py").items() if name.startswith(("fast/", "evaluation/"))}
    assert [name for name, text in sources.items() if comparisons(text)] == ["fast/backends.py"]


@pytest.mark.parametrize(
    "source",
    [
        "if backend == 'torch': pass",
        "x = 1 if 'triton' != self.backend else 2",
        "while chosen not in ('auto', 'cpp'): pass",
        "match backend:\n    case 'torch' | 'triton': pass",
        "f = [each for each in backends if each in {'cpp'}]",
    ],
    ids=itertools.count(),
)
def test_a_comparison_with_a_backends_name_is_found(source):
    assert comparisons(source)


@pytest.mark.parametrize(
    "source",
    [
        "attend(query, backend='torch')",
        "Backend = Literal['auto', 'torch', 'triton']",
        "if keys.device.type == 'cpu' and backend == other.backend: pass",
        "TABLE = {'torch': plain, 'cpp': cpu}",
    ],
    ids=itertools.count(),
)
def test_a_name_that_is_passed_on_is_no_comparison(source):
    assert comparisons(source) == []
