"""The tests as on other processors: once for each set of instructions and each number of threads.

    python tests/machines.py                       all tests, an hour or more
    python tests/machines.py --quick               without the slow ones
    python tests/machines.py tests/fast -k twin    of which pytest is told what it is to run
    python tests/machines.py --instructions oldest --threads 2    one run
    python tests/machines.py --memory tests/fast    the package's C++ is stopped where it leaves its memory

Libraries that choose their code by the processor are told to do without its newer instructions. The package's own C++
is compiled for the processor as it is, in every run. A test that fails in one run only is a test of the processor.
"""

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
BEYOND_NUMPY = {  # what other libraries are told: torch, MKL, oneDNN, OpenBLAS
    "native": {},
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "OPENBLAS_CORETYPE": "Haswell",
    },
    "oldest": {
        "ATEN_CPU_CAPABILITY": "default",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "OPENBLAS_CORETYPE": "Nehalem",
    },
}
INSTRUCTIONS = tuple(BEYOND_NUMPY) if platform.machine() in {"x86_64", "AMD64"} else ("native",)


@dataclass(frozen=True)
class Outcome:
    """How a run of the tests went, and which of them failed."""

    n_passed: int
    n_skipped: int
    failed: list[str]
    seconds: float
    has_passed: bool


def environment_of(instructions: str, threads: int) -> dict[str, str]:
    """The environment of a run: our variables for libraries, and none that would overrule them."""
    names_of_threads = {"OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"}
    kept = {name: value for name, value in os.environ.items() if name not in names_of_threads}
    found = np.show_config(mode="dicts")["SIMD Extensions"].get("found", [])
    without = {
        "native": [],
        "avx2": [name for name in found if name.startswith(("AVX512", "X86_V4"))],
        "oldest": found,
    }[instructions]
    return {
        **kept,
        **BEYOND_NUMPY[instructions],
        **({"NPY_DISABLE_CPU_FEATURES": " ".join(without)} if without else {}),
        "KVCLUSTER_TEST_THREADS": str(threads),
        "TORCHINDUCTOR_CACHE_DIR": str(ROOT / ".cache" / "inductor" / instructions),  # it may keep vector code
    }


def sanitized(folder: Path) -> dict[str, str]:
    """The environment in which C++ that leaves its memory, or overflows, ends the process and says so in `folder`."""
    compiler = shutil.which("g++")
    if compiler is None:
        raise SystemExit("--memory needs g++")
    libraries = [
        subprocess.run([compiler, f"-print-file-name={name}.so"], capture_output=True, text=True).stdout.strip()
        for name in ("libasan", "libubsan")
    ]
    with_checks = folder / "g++"
    with_checks.write_text(f'#!/bin/sh\nexec {compiler} -fsanitize=address,undefined -g1 "$@"\n')
    with_checks.chmod(0o755)
    said = f"log_path={folder / 'found'}:halt_on_error=1"
    return {
        "CXX": str(with_checks),
        "LD_PRELOAD": " ".join(libraries),  # Python itself is not compiled with them
        "ASAN_OPTIONS": f"{said}:detect_leaks=0",
        "UBSAN_OPTIONS": said,
    }


def run_tests(instructions: str, threads: int, arguments: list[str], *, checks_memory: bool = False) -> Outcome:
    """Pytest in a process of its own, which may say on the terminal what it has to say."""
    environment = environment_of(instructions, threads)
    with tempfile.TemporaryDirectory() as folder:
        if checks_memory:
            environment |= sanitized(Path(folder))
        report = Path(folder) / "report.xml"
        options = ["-q", "-n", "2", "--dist", "loadgroup", "--max-worker-restart", "0", "-p", "no:cacheprovider"]
        options += ["-o", "junit_family=xunit1", f"--junitxml={report}"]
        began = time.perf_counter()
        made = subprocess.run([sys.executable, "-m", "pytest", *options, *arguments], cwd=ROOT, env=environment)
        for found in Path(folder).glob("found*"):
            print(found.read_text())
        seconds = time.perf_counter() - began
        cases = list(ElementTree.parse(report).iter("testcase")) if report.exists() else []
    failed = [
        f"{case.get('file')}::{case.get('name')}"
        for case in cases
        if case.find("failure") is not None or case.find("error") is not None
    ]
    n_skipped = sum(case.find("skipped") is not None for case in cases)
    return Outcome(len(cases) - n_skipped - len(failed), n_skipped, failed, seconds, made.returncode == 0)


def main() -> int:
    parser = argparse.ArgumentParser(description="All other arguments go to pytest.")
    parser.add_argument("--quick", action="store_true", help="without the slow tests")
    parser.add_argument("--instructions", action="append", choices=INSTRUCTIONS, help="may be repeated; all by default")
    parser.add_argument("--threads", action="append", type=int, help="may be repeated; 1 and 2 by default")
    parser.add_argument("--memory", action="store_true", help="one run, in which C++ that leaves its memory fails")
    chosen, arguments = parser.parse_known_args()
    arguments += ["-m", "not slow"] if chosen.quick else []
    if chosen.memory:
        return 0 if run_tests("native", 2, arguments, checks_memory=True).has_passed else 1
    console, runs = Console(), {}
    for instructions in chosen.instructions or INSTRUCTIONS:
        for threads in chosen.threads or (1, 2):
            console.rule(f"{instructions}, {threads} {'thread' if threads == 1 else 'threads'}")
            runs[instructions, threads] = run_tests(instructions, threads, arguments)

    table = Table("instructions", "threads", "passed", "failed", "skipped", "seconds")
    failed_in = defaultdict(list)
    for (instructions, threads), outcome in runs.items():
        counts = outcome.n_passed, len(outcome.failed), outcome.n_skipped, round(outcome.seconds)
        table.add_row(instructions, *map(str, (threads, *counts)), style=None if outcome.has_passed else "red")
        for name in outcome.failed:
            failed_in[name].append(f"{instructions} {threads}")
    console.print(table)
    for name, where in failed_in.items():
        console.print(f"{name}: {', '.join(where)}", style="red", highlight=False, markup=False)
    return 0 if all(outcome.has_passed for outcome in runs.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
