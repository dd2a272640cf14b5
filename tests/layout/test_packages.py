"""What pyproject.toml says about the tree is true: its packages, its version, what it depends on."""

import re

import pytest
from sources import PROJECT, ROOT, Module, package_modules

import kvcluster

LISTED = PROJECT["tool"]["setuptools"]["packages"]
CONSTRAINTS = (ROOT / "requirements" / "constraints.txt").read_text().split()
EXTRAS = PROJECT["project"]["optional-dependencies"]


def unlisted(modules, packages):
    """Folders with an __init__.py that no wheel would have, and packages without one."""
    return sorted({module.name for module in modules if module.is_package} ^ set(packages))


def test_every_folder_with_an_init_is_a_package():
    assert unlisted(package_modules(), LISTED) == []


def test_a_forgotten_folder_is_found():
    new = Module("kvcluster.fast.exact.deeper", "", is_package=True)
    assert unlisted([*package_modules(), new], LISTED) == [new.name]
    assert unlisted(package_modules(), [*LISTED, new.name]) == [new.name]


def test_one_mark_says_that_all_packages_have_types():
    assert (ROOT / "package" / "py.typed").exists()
    assert PROJECT["tool"]["setuptools"]["package-data"]["kvcluster"] == ["py.typed"]


def test_there_is_one_version():
    version = PROJECT["project"]["version"]
    assert kvcluster.__version__ == version
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"version = {{{version}}}" in (ROOT / "README.md").read_text()


def unbounded(requirements):
    """Requirements without a lower bound."""
    return [each for each in requirements if not re.match(r"[\w-]+(>=\d|\[)", each)]


@pytest.mark.parametrize("extra", [None, *EXTRAS])
def test_what_is_needed_has_a_lower_bound_and_is_pinned_for_the_tests(extra):
    requirements = PROJECT["project"]["dependencies"] if extra is None else EXTRAS[extra]
    assert unbounded(requirements) == []
    names = {re.split(r"[>\[]", each)[0].lower().replace("-", "_") for each in requirements} - {"kvcluster"}
    assert names <= {each.partition("==")[0].lower().replace("-", "_") for each in CONSTRAINTS}


def test_a_requirement_without_a_bound_is_found():
    assert unbounded(["numpy", "torch<3", "rich>=13", "kvcluster[hf]"]) == ["numpy", "torch<3"]


def test_constraints_are_exact_and_in_order():
    assert [each for each in CONSTRAINTS if not re.fullmatch(r"[\w.-]+==[\w.]+", each)] == []
    assert sorted(CONSTRAINTS, key=str.lower) == CONSTRAINTS
