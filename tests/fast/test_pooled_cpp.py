"""The C++ of pooled matching: mistakes in it are found, and no instructions or threads change a bit."""

import os
import platform
import shutil

import numpy as np
import pytest
import torch
from inputs import KINDS
from stored_entries import agrees, assert_agrees, stored

from kvcluster.fast.cpu import compiling

pytestmark = pytest.mark.slow  # each compiles for itself


@pytest.fixture
def compile_anew(monkeypatch, tmp_path):
    """C++ of the package with a change of its text, or with other flags, kept for one test."""

    def anew(right="", wrong="", flags=compiling.FLAGS):
        sources = tmp_path / "sources"
        shutil.copytree(compiling.FOLDER, sources, ignore=shutil.ignore_patterns("*.py*"))
        text = (sources / "pooled.cpp").read_text()
        assert right == "" or text.count(right) == 1
        (sources / "pooled.cpp").write_text(text.replace(right, wrong) if right else text)
        monkeypatch.setattr(compiling, "FOLDER", sources)
        monkeypatch.setattr(compiling, "FLAGS", flags)
        monkeypatch.setattr("platformdirs.user_cache_path", lambda _: tmp_path)
        changed = compiling.library.__wrapped__("pooled")
        monkeypatch.setattr("kvcluster.fast.cpu.pooled_matching.library", lambda _: changed)

    return anew


WRONG_IN_CPP = {
    "ties between matches: the last": (": a < b;", ": a > b;"),
    "ties between destinations: the last block": ("similarity > c.best[i]", "similarity >= c.best[i]"),
    "ties between destinations: the last lane": ("&& j < destination", "&& j > destination"),
    "means without weights": ("(array[entry * dim + d]) * counts[entry]", "(array[entry * dim + d])"),
    "sums start from zero": ("sums(n_left * dim, -0.0)", "sums(n_left * dim, 0.0)"),
    "products in float32": ("+= static_cast<double>(array", "+= static_cast<float>(array"),
    "the square without its sign": ("dot * (dot < 0.0 ? -dot : dot)", "dot * dot"),
    "the last chunk left out": ("if (size > 1) match", "if (size == s.chunk) match"),
}


@pytest.mark.parametrize("name", WRONG_IN_CPP)
def test_wrong_twins_of_the_cpp_are_told_apart(name, compile_anew):
    rules = {"target": 30, "chunk_size": 40}
    inputs = [stored(kind, (1, 2, 75, 16)) for kind in ("signs", "normal", "zeros")]
    inputs.append((-np.abs(inputs[-1][0]), *inputs[-1][1:]))  # has negative zeros
    assert all(agrees("cpp", arrays, **rules) for arrays in inputs)
    compile_anew(*WRONG_IN_CPP[name])
    assert not all(agrees("cpp", arrays, **rules) for arrays in inputs)


@pytest.mark.parametrize("instructions", ["-march=native", "-march=x86-64-v3", "-march=x86-64"])
def test_cpp_has_the_same_bits_with_any_instructions_and_threads(instructions, compile_anew):
    if instructions != "-march=native" and platform.machine() not in {"x86_64", "AMD64"}:
        pytest.skip("these are instructions of x86-64 processors")
    compile_anew(flags=[instructions if flag.startswith("-march") else flag for flag in compiling.FLAGS])
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            for kind in KINDS:
                assert_agrees("cpp", stored(kind, (2, 3, 131, 80)), target=30, chunk_size=32)
        finally:
            torch.set_num_threads(int(os.environ["KVCLUSTER_TEST_THREADS"]))
