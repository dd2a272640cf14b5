"""A method is a value: the same small dataclass in the reference and in fast, and no switch of any cache."""

import ast
import dataclasses
import inspect
import itertools

import pytest
from models import tiny_llama
from sources import files

from kvcluster import fast, reference
from kvcluster.fast.huggingface import ClusteredCache

METHODS = ("Attended", "Distinctive", "SoftMatching")


def fields(method):
    """Names and defaults, of a dataclass that nobody can change."""
    assert method.__dataclass_params__.frozen
    return [(field.name, field.default) for field in dataclasses.fields(method)]


@pytest.mark.parametrize("name", METHODS)
def test_a_method_has_the_same_fields_in_both(name):
    ours, theirs = getattr(fast, name), getattr(reference, name)
    assert fields(ours) == fields(theirs)
    assert ours() == ours()
    assert repr(ours()) == repr(theirs())


@pytest.mark.parametrize("cache", [reference.ClusteredCache, fast.ClusteredCache])
def test_a_cache_takes_a_method(cache):
    default = inspect.signature(cache).parameters["method"].default
    assert repr(default) == "SoftMatching()"


def test_a_cache_for_a_model_takes_a_method_and_chooses_one_that_is_known():
    default = inspect.signature(ClusteredCache.for_model).parameters["method"].default
    assert default is None
    cache = ClusteredCache.for_model(tiny_llama(), keep_ratio=0.5)
    assert cache.parameters["method"] == fast.Distinctive()


def switches(source):
    """Methods of caches, and functions called for_model, that take a parameter of one clustering method."""
    tree = ast.parse(source)
    caches = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and "Cache" in node.name]
    inner = {node: cache.name for cache in caches for node in cache.body if isinstance(node, ast.FunctionDef)}
    makers = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "for_model"]
    return [
        f"{inner.get(function, '')}.{function.name}"
        for function in dict.fromkeys([*inner, *makers])
        for argument in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)
        if argument.arg == "n_shared"
    ]


def test_no_cache_takes_a_parameter_of_one_method():
    found = {name: switches(text) for name, text in files(".py").items() if not name.startswith("tests/")}
    assert {name: where for name, where in found.items() if where} == {}


@pytest.mark.parametrize(
    "source",
    [
        "class ClusteredCache:\n    def __init__(self, *, keep_ratio, n_shared=None): pass",
        "class Layers(CacheLayer):\n    @classmethod\n    def for_model(cls, model, n_shared): pass",
        "def for_model(model, *, n_shared=4): pass",
    ],
    ids=itertools.count(),
)
def test_a_switch_is_found(source):
    assert len(switches(source)) == 1


def test_the_method_itself_is_no_switch():
    source = "class Distinctive:\n    n_shared: int = 4\n\ndef distinctive_matching(keys, values, *, n_shared=4): pass"
    assert switches(source) == []


@dataclasses.dataclass
class Changeable:
    n_shared: int = 4


def test_a_method_that_can_be_changed_is_found():
    with pytest.raises(AssertionError):
        fields(Changeable)
