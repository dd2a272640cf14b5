"""An implementation in a process of its own: whatever becomes of that is told of one case, and the others go on."""

import math
import types

import numpy as np
import pytest

from kvcluster import reference
from kvcluster.conformance import Implementation, Isolated, check
from kvcluster.conformance.cases import cases_of
from kvcluster.conformance.isolated import UnloadableError, ended_by

ENDS = """
import ctypes, os, signal, sys, time

from kvcluster.reference import alternating_partition as right

def alternating_partition(size):
    if size == 0:
        ctypes.string_at(0)  # a segmentation fault
    elif size == 1:
        time.sleep(1000)
    elif size == 2:
        os.kill(os.getpid(), signal.SIGKILL)  # as where no memory is left
    elif size == 3:
        raise MemoryError
    return right(size)
"""


def isolated(tmp_path, text, case_seconds=math.inf):
    (tmp_path / "adapter.py").write_text(text)
    return Isolated(str(tmp_path / "adapter.py"), case_seconds)


def test_every_end_is_told_by_operation_and_case_and_the_others_go_on(tmp_path):
    with isolated(tmp_path, ENDS, case_seconds=3) as subject:
        report = check(subject, only=("alternating_partition",)).operations[0]
    assert report.ended == [
        "size0 ended its process by SIGSEGV",
        "size1 was stopped after 3 s",
        "size2 ended its process by SIGKILL (no memory may be left)",
        "size3 ran out of memory",
    ]
    assert (report.n_cases, report.n_failed, report.verdict) == (2, 0, "cannot be told")


def test_after_some_ends_an_operation_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr("kvcluster.conformance.suite.MOST_ENDED", 1)
    with isolated(tmp_path, ENDS) as subject:
        report = check(subject, only=("alternating_partition",)).operations[0]
    assert (len(report.ended), report.skipped) == (1, {"too many cases ended their process": 5})


PRINTS = """
print("loading")
from helper_of_adapter import nothing

def alternating_partition(size):
    import helper_later
    print("size", size)
    return helper_later.right(size)
"""


def test_what_is_printed_is_printed_and_files_beside_are_imported_late(tmp_path, capsys):
    (tmp_path / "helper_of_adapter.py").write_text("nothing = None\n")
    (tmp_path / "helper_later.py").write_text("from kvcluster.reference import alternating_partition as right\n")
    with isolated(tmp_path, PRINTS) as subject:
        assert check(subject, only=("alternating_partition",)).agrees
    assert capsys.readouterr().out.splitlines()[:3] == ["loading", "size 0", "size 1"]


def test_what_cannot_be_loaded_is_told_with_its_line(tmp_path):
    with pytest.raises(UnloadableError, match=r"ZeroDivisionError: division by zero \(.*adapter.py, line 2\)"):
        isolated(tmp_path, "\n1 / 0\n")


def test_ends_in_words():
    assert ended_by(3) == "ended its process with exit status 3"
    assert ended_by(-11) == "ended its process by SIGSEGV"
    assert ended_by(-200) == "ended its process by signal 200"


def test_what_is_right_at_the_second_time_is_unsteady():
    asked = []

    def alternating_partition(size):
        asked.append(size)
        made = reference.alternating_partition(size)
        return made if asked.count(size) > 1 or size != 3 else made[::-1]

    report = check(
        Implementation(types.SimpleNamespace(alternating_partition=alternating_partition)), has_smallest=False
    )
    found = report.operations[0]
    assert (found.unsteady, found.verdict, found.n_failed) == (["size3"], "differs", 1)
    assert "unsteady" in found.failed[0]


def test_arrays_are_the_same_in_another_process(tmp_path):
    with isolated(tmp_path, "from kvcluster.reference import merge\n") as subject:
        here = Implementation(reference)
        for case in cases_of("merge", 0):
            theirs, ours = subject.answer(case), here.answer(case)
            assert theirs.arrays.keys() == ours.arrays.keys()
            assert all(np.array_equal(theirs.arrays[name], array) for name, array in ours.arrays.items())
            assert (theirs.error is None) == (ours.error is None)
