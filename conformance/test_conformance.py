"""The conformance suite as tests: `pytest --pyargs kvcluster.conformance --implementation TARGET`."""

import pytest

from . import Case, Implementation, all_cases, load_implementation
from .comparing import compare
from .explaining import explain
from .implementation import run


@pytest.fixture(scope="session")
def implementation(request: pytest.FixtureRequest) -> Implementation:
    return load_implementation(request.config.getoption("--implementation"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.config.getoption("--implementation") is None:
        raise pytest.UsageError("--implementation must name a module or a .py file, got none")
    cases = list(all_cases())
    metafunc.parametrize("case", cases, ids=[f"{case.operation}-{case.name}" for case in cases])


def test_result_is_the_references(implementation: Implementation, case: Case) -> None:
    reason = implementation.accepts(case)
    if reason is not None:
        pytest.skip(reason)
    outcome = run(implementation, case)
    difference = compare(case, outcome)
    if difference is not None:
        mistake = explain([(case, outcome)])
        cause = "" if mistake is None else f"; {mistake.cause} (rule {mistake.rule} of SPECIFICATION.md)"
        pytest.fail(f"{difference.text}: expected {difference.expected}, got {difference.got}{cause}", pytrace=False)
