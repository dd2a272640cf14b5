"""The C++ under the address and the undefined-behaviour sanitizer, called over odd shapes and layouts.

Compiled as `CXX` says, a script that adds the sanitizers, and without optimisation, which takes a fifth of the time.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kvcluster.fast.cpu.compiling import FOLDER, compiler

pytestmark = pytest.mark.slow

PROGRAM = Path(__file__).parents[1] / "sanitized.py"
SANITIZED = "-O0 -g -fsanitize=address,undefined -fno-sanitize-recover=all"
MOST_SECONDS = 500


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """That of a process whose C++ is sanitized; skips where the compiler cannot."""
    program, folder = compiler(), tmp_path_factory.mktemp("sanitized")
    if program is None:
        pytest.skip("needs a C++ compiler")
    (folder / "empty.cpp").write_text("")
    command = [program, *SANITIZED.split(), "-shared", "-fPIC", "empty.cpp", "-o", "empty.so"]
    needed = [subprocess.run(command, cwd=folder, capture_output=True, text=True).stderr]
    needed += [library_of(program, name) for name in ("libasan.so", "libstdc++.so")]
    if needed[0] or None in needed or shutil.which("nm") is None:
        pytest.skip(f"needs the address and the undefined-behaviour sanitizer of GCC: {needed[0]:.200}")
    script = folder / "c++"
    script.write_text(f'#!/bin/sh\nexec {program} "$@" {SANITIZED}\n')
    script.chmod(0o755)
    added = {"CXX": str(script), "XDG_CACHE_HOME": str(folder), "LD_PRELOAD": " ".join(needed[1:])}
    return os.environ | added | {"ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "2"}


def library_of(program, name):
    """The path of a library of the compiler's; None if it has none."""
    said = subprocess.run([program, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    return str(Path(said).resolve()) if Path(said).is_absolute() else None


def run(environment, *arguments):
    command = [sys.executable, str(PROGRAM), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=MOST_SECONDS)


def functions(folder):
    """What the libraries in a folder have for Python, by the name of their file's source."""
    found = {}
    for path in folder.glob("*.so"):
        listed = subprocess.run(["nm", "-D", "--defined-only", path], capture_output=True, text=True, check=True)
        found[path.stem.rpartition("-")[0]] = {x for x in listed.stdout.split() if x.startswith("kvcluster_")}
    return found


@pytest.mark.skipif(torch.cuda.is_available(), reason="memory of CUDA and of the sanitizer are in each other's way")
def test_every_function_of_the_cpp_is_sane(environment):
    done = run(environment, "240")
    assert done.returncode == 0, done.stderr[:6000]
    compiled = functions(Path(environment["XDG_CACHE_HOME"]) / "kvcluster")
    assert set(compiled) == {path.stem for path in FOLDER.glob("*.cpp")}
    assert set(done.stdout.split()) == set().union(*compiled.values())
    assert "Sanitizer" not in done.stderr
    assert "runtime error" not in done.stderr


TWINS = {
    "one read past the end": ("i < inputs; i += LANES", "i <= inputs; i += LANES", "heap-buffer-overflow"),
    "a shift that is not defined": (
        "std::min<int64_t>(ROWS, n - row)",
        "std::min<int64_t>(ROWS, n - row) + (1 << (32 + static_cast<int>(row))) * 0",
        "shift exponent 32 is too large",
    ),
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="memory of CUDA and of the sanitizer are in each other's way")
@pytest.mark.parametrize("name", TWINS)
def test_wrong_twins_are_reported(environment, name, tmp_path):
    right, wrong, said = TWINS[name]
    folder = shutil.copytree(FOLDER, tmp_path / "cpu")
    source = (folder / "linear.cpp").read_text()
    assert source.count(right) == 1
    arguments = "8", "--only", "layers", "--folder", str(folder)
    assert run(environment, *arguments).returncode == 0
    (folder / "linear.cpp").write_text(source.replace(right, wrong))
    done = run(environment, *arguments)
    assert done.returncode != 0
    assert said in done.stderr
