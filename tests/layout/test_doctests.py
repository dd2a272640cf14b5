"""Every example in a docstring or on a page is run, and says what is true."""

import doctest
import importlib
import re
import types

import numpy as np
import pytest
from sources import ROOT, files, import_name, installed_files

PROMPT = re.compile(r"(?m)^\s*>>> ")
PYTHON = {name: text for name, text in files(".py").items() if PROMPT.search(text) and not name.startswith("tests/")}
PAGES = {name: text for name, text in files(".md").items() if PROMPT.search(text)}


def faults(module, text):
    """How many examples of a module failed, and how many are written but were not run: in a comment, or skipped."""
    result = doctest.testmod(module, extraglobs={"np": np})
    return result.failed, len(PROMPT.findall(text)) - result.attempted


@pytest.mark.parametrize("file", PYTHON)
def test_examples_in_docstrings_are_true(file):
    module = importlib.import_module(import_name(installed_files().get(ROOT / file, file)))
    assert faults(module, PYTHON[file]) == (0, 0)


def test_examples_on_pages_are_true():
    for name, text in PAGES.items():
        without_fences = re.sub("(?m)^```.*$", "", text)
        examples = doctest.DocTestParser().get_doctest(without_fences, {"np": np}, name, name, 0)
        assert doctest.DocTestRunner().run(examples) == (0, len(PROMPT.findall(text))), name


def test_tests_have_no_examples_but_made_up_ones():
    has_examples = {name for name, text in files(".py").items() if PROMPT.search(text)} - set(PYTHON)
    made_up = {"tests/layout/test_doctests.py", "tests/layout/test_sizes.py"}
    assert {name for name in has_examples if not name.startswith("tests/layout/new_method/")} == made_up


TRUE = """
def twice(x):
    '''Two times.

    >>> twice(2)
    4
    '''
    return 2 * x
"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (TRUE, (0, 0)),
        (TRUE.replace("    4", "    5"), (1, 0)),
        (TRUE.replace("twice(2)", "twice(2)  # doctest: +SKIP"), (0, 1)),
        (TRUE + "# >>> twice(3)\n" + "x = '''\n>>> twice(3)\n6\n'''\n", (0, 1)),
        ("def outer():" + TRUE.replace("\n", "\n    "), (0, 1)),
    ],
    ids=["true", "false", "skipped", "in no docstring", "of an inner function"],
)
def test_an_example_that_is_false_or_not_run_is_found(text, expected):
    module = types.ModuleType("made_up")
    exec(text, vars(module))
    assert faults(module, text) == expected
