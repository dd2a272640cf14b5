"""The conformance suite as tests: `pytest --pyargs kvcluster.conformance --implementation TARGET`."""

import os
import warnings
from collections.abc import Iterator

import pytest

from . import Case, Isolated, all_cases, load_implementation
from .child import in_words
from .comparing import compare, expected
from .explaining import Failure, explain
from .guard import DisturbedError
from .implementation import Subject
from .isolated import UnloadableError

SUBJECT = pytest.StashKey[Subject | str]()  # or why there is none


def loaded(target: str) -> Subject | str:
    """The implementation, in a process of its own where there can be one, or why it cannot be loaded."""
    try:
        return Isolated(target) if os.name == "posix" else load_implementation(target)
    except (DisturbedError, UnloadableError) as error:
        reason = str(error)
    except (Exception, SystemExit) as error:  # whatever a module raises when it is imported
        reason = in_words(error)
    return f"--implementation {target}: {reason}"


@pytest.fixture(scope="session")
def implementation(request: pytest.FixtureRequest) -> Iterator[Subject | str]:
    subject = request.config.stash[SUBJECT]
    yield subject
    if isinstance(subject, Isolated):
        subject.close()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    target = metafunc.config.getoption("--implementation")
    if target is None:
        raise pytest.UsageError("--implementation must name a module or a .py file, got none")
    if SUBJECT not in metafunc.config.stash:
        metafunc.config.stash[SUBJECT] = loaded(target)
    if isinstance(metafunc.config.stash[SUBJECT], str):
        metafunc.parametrize("case", [None], ids=["nothing"])  # one line, not an error for each case
        return
    cases = list(all_cases())
    metafunc.parametrize("case", cases, ids=[f"{case.operation}-{case.name}" for case in cases])


def test_result_is_the_references(implementation: Subject | str, case: Case | None) -> None:
    if isinstance(implementation, str) or case is None:
        pytest.exit(str(implementation), returncode=2)
    try:
        outcome = implementation.answer(case)
    except (DisturbedError, UnloadableError) as error:
        pytest.exit(str(error), returncode=2)
    if outcome.skipped is not None:
        pytest.skip(outcome.skipped)
    if outcome.ended is not None:
        pytest.fail(f"no answer: {outcome.ended}", pytrace=False)
    difference = compare(case, outcome)
    if difference is not None:
        mistake = explain([Failure(case, outcome, difference)])
        cause = "" if mistake is None else f"; {mistake.cause} (rule {mistake.rule} of SPECIFICATION.md)"
        pytest.fail(f"{difference.text}: expected {difference.expected}, got {difference.got}{cause}", pytrace=False)
    if not case.is_refused and (absent := [name for name in expected(case) if name not in outcome.arrays]):
        warnings.warn(f"{case.operation} does not show {', '.join(absent)}: not compared", stacklevel=1)
