"""The reference can be read in an evening, and a file has one idea."""

import pytest
from sources import files

EVENING = ["attention", "similarity", "partition", "merging", "chunks", "soft_matching", "clustered_attention"]
EVENING += ["entry_cache", "cache"]
MOST = 300  # lines of a file
MOST_OF_TESTS = 330
ROOMS = ("reference/", "conformance/", "fast/", "evaluation/", "theory/", "cli/", "package/", "benchmarks/", "docs/")


def lines_without_examples(source):
    """How many lines a source has without its doctests: from a `>>>` to the next empty line or the docstring's end."""
    n_lines, is_example = 0, False
    for line in source.splitlines():
        text = line.strip()
        is_example = text.startswith(">>>") or (is_example and text != "" and '"""' not in text)
        n_lines += not is_example
    return n_lines


def total(sources):
    return sum(map(lines_without_examples, sources))


def too_long(sources, most):
    return {name: len(text.splitlines()) for name, text in sources.items() if len(text.splitlines()) > most}


PYTHON = files(".py")
REFERENCE = {name: text for name, text in PYTHON.items() if name.startswith("reference/")}


def test_the_reference_stays_short():
    assert total(REFERENCE.values()) < 3700
    assert total(REFERENCE[f"reference/{name}.py"] for name in EVENING) < 700


def test_no_file_has_two_ideas():
    assert too_long({name: text for name, text in PYTHON.items() if name.startswith(ROOMS)}, MOST) == {}
    assert too_long({name: text for name, text in PYTHON.items() if name.startswith("tests/")}, MOST_OF_TESTS) == {}


def test_every_file_is_in_a_room():
    assert [name for name in PYTHON if not name.startswith((*ROOMS, "tests/"))] == []


EXAMPLE = '''def twice(x):
    """Two times.

    >>> twice(
    ...     2
    ... )
    4
    >>> twice(3)
    6
    """
    return 2 * x
'''


def test_lines_of_examples_are_not_counted():
    assert lines_without_examples(EXAMPLE) == 5
    assert lines_without_examples(EXAMPLE.replace("    6\n", "    6\n\n    More.\n")) == 7
    assert lines_without_examples("x = 1\n\ny = 2\n") == 3


@pytest.mark.parametrize(("n_lines", "is_too_long"), [(300, False), (301, True)])
def test_a_long_file_is_found(n_lines, is_too_long):
    assert bool(too_long({"fast/cache.py": "x = 1\n" * n_lines}, MOST)) == is_too_long


def test_a_long_reference_is_found():
    assert total([EXAMPLE] * 140) == 700
