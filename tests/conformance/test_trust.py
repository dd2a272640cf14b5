"""A run agrees only because it is right: not since an adapter changed the arithmetic, left, or was not asked."""

import json
import shutil
import subprocess
from xml.etree import ElementTree

import numpy as np
import pytest
from ports import RIGHT_PORT
from typer.testing import CliRunner

from kvcluster import reference
from kvcluster.cli import app
from kvcluster.conformance.guard import DisturbedError, Guard
from kvcluster.conformance.implementation import load_implementation

HEAD = "from kvcluster.reference import alternating_partition, merge as right\n"
IN_A_CALL = HEAD + "\ndef merge(array, clustering):\n    {}\n    return right(array, clustering)\n"
FAST_MATH = """
#include <xmmintrin.h>
__attribute__((constructor)) static void start(void) { _mm_setcsr(_mm_getcsr() | 0x8040); }
"""


def checked(tmp_path, text, *options):
    """Exit code, standard output and standard error of the check of an adapter, and its reports."""
    (tmp_path / "adapter.py").write_text(text)
    reports = ("--json", tmp_path / "report.json", "--junit", tmp_path / "report.xml")
    done = CliRunner().invoke(app, ["check", *map(str, (tmp_path / "adapter.py", *reports, *options))])
    report = json.loads((tmp_path / "report.json").read_text())
    suite = ElementTree.parse(tmp_path / "report.xml").getroot()
    assert report["agrees"] == (done.exit_code == 0)
    assert (suite.get("failures"), suite.get("errors")) == ("0", "0") or not report["agrees"]
    if not report["agrees"]:
        assert int(suite.get("failures")) + int(suite.get("errors")) > 0
    return done.exit_code, done.stdout, done.stderr


DISTURBING = {
    "at import": "import torch\ntorch.set_flush_denormal(True)\n" + HEAD.replace(" as right", ""),
    "in a call": IN_A_CALL.format("import torch; torch.set_flush_denormal(True)"),
}


@pytest.mark.parametrize("when", DISTURBING)
@pytest.mark.parametrize("option", ["--isolate", "--no-isolate"])
def test_flushing_subnormals_is_told(when, option, tmp_path):
    import torch

    try:
        code, _, said = checked(tmp_path, DISTURBING[when], option, "--only", "merge")
    finally:
        torch.set_flush_denormal(False)
    assert code == 2
    assert "subnormal numbers are flushed to zero" in said
    assert ("the import of" if when == "at import" else "merge normal-E1-f16") in said


@pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler here")
def test_a_library_that_flushes_subnormals_is_told(tmp_path):
    (tmp_path / "fast.c").write_text(FAST_MATH)
    command = ["cc", "-shared", "-fPIC", "-o", tmp_path / "fast.so", tmp_path / "fast.c"]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a control register of another processor")
    load = f"import ctypes\nctypes.CDLL({str(tmp_path / 'fast.so')!r})\n"
    code, _, said = checked(tmp_path, load + HEAD.replace(" as right", ""))
    assert (code, "subnormal numbers are flushed to zero" in said) == (2, True)


def test_another_rounding_mode_is_told(tmp_path):
    upward = "import ctypes, ctypes.util; ctypes.CDLL(ctypes.util.find_library('m')).fesetround(0x800)"
    code, _, said = checked(tmp_path, IN_A_CALL.format(upward), "--only", "merge")
    if code == 0:
        pytest.skip("this number is no rounding mode here")
    assert (code, "not rounded to nearest" in said) == (2, True)


def test_the_guard_sees_numpy_and_a_replaced_reference(monkeypatch):
    guard = Guard()
    guard.check("nothing")
    old = np.seterr(over="raise")
    try:
        with pytest.raises(DisturbedError, match="this changed its process: NumPy's error state"):
            guard.check("this")
        assert np.geterr() == guard.errors  # and it is as before
    finally:
        np.seterr(**old)
    monkeypatch.setattr(reference, "similarity", lambda a, b: np.float64(a @ b.T))
    with pytest.raises(DisturbedError, match="something in them was replaced"):
        guard.check("this")


LEAVING = {
    "sys.exit at import": "import sys\n" + HEAD + "sys.exit(0)\n",
    "os._exit at import": "import os\n" + HEAD + "os._exit(0)\n",
    "sys.exit in a call": IN_A_CALL.format("import sys; sys.exit(0)"),
    "os._exit in a call": IN_A_CALL.format("import os; os._exit(0)"),
}


@pytest.mark.parametrize("what", LEAVING)
@pytest.mark.parametrize("option", ["--isolate", "--no-isolate"])
def test_leaving_is_told(what, option, tmp_path):
    code, _, said = checked(tmp_path, LEAVING[what], option)
    assert code == 2
    assert ("cannot be loaded" if "import" in what else "merge normal-E1-f16 left by") in said
    assert what.split()[0].replace("sys.exit", "xit") in said


def test_a_partial_run_is_told(tmp_path):
    slow = IN_A_CALL.format("import time; time.sleep(0.2)")
    code, shown, said = checked(tmp_path, slow, "--only", "merge", "--max-seconds", "1")
    assert (code, "cannot be told" in shown, "--max-seconds came before the end" in said) == (2, True, True)


UNUSABLE = {
    "chunked_soft_matchin, which is nearly chunked_soft_matching": "def chunked_soft_matchin(keys): pass\n",
    "DTYPE, which is nearly DTYPES": "DTYPE = ('f32',)\n",
    "ARRAYS must be one of numpy, torch, got 'jax'": "ARRAYS = 'jax'\n",
    "DTYPES must be a tuple of some of f16, bf16, f32, got 'f32'": "DTYPES = 'f32'\n",
    "DTYPES must be a tuple of some of f16, bf16, f32, got ()": "DTYPES = ()\n",
    "REFUSES must be True or False, got 'no'": "REFUSES = 'no'\n",
}


@pytest.mark.parametrize("told", UNUSABLE)
def test_what_is_mistyped_is_told(told, tmp_path):
    code, _, said = checked(tmp_path, RIGHT_PORT + UNUSABLE[told], "--no-isolate")
    assert (code, told in said) == (2, True), said


def test_only_what_is_there_can_be_asked_for(tmp_path):
    code, _, said = checked(tmp_path, RIGHT_PORT, "--only", "similarity", "--only", "merge", "--no-isolate")
    assert (code, "does not have: merge" in said) == (2, True)


def test_names_of_ones_own_and_names_alike_that_are_there_are_no_mistakes(tmp_path):
    more = "\ndef merged(x): return x\n\ndef _kmean(x): return x\n\nLIMIT = 3\n"
    path = tmp_path / "adapter.py"
    path.write_text("from kvcluster.reference import merge\n" + more)
    assert load_implementation(str(path)).operations == ("merge",)
