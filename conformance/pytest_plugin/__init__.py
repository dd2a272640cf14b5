"""The option of `pytest --pyargs kvcluster.conformance --implementation my_package.my_module`.

A package of its own, since pytest loads it at every start: it imports nothing.
"""

from typing import Any

__all__ = ["pytest_addoption"]


def pytest_addoption(parser: Any) -> None:
    """Add `--implementation`."""
    group = parser.getgroup("kvcluster", "kvcluster's conformance suite")
    group.addoption(
        "--implementation",
        metavar="TARGET",
        help="package.module, or a path to a .py file: what pytest --pyargs kvcluster.conformance checks",
    )
