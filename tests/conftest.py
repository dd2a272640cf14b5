"""Every test runs on one thread, for two pytest workers share two cores; KVCLUSTER_TEST_THREADS asks for more.

Without a CUDA device the Triton kernels run in Triton's interpreter, which must be asked for before triton is imported.
"""

import functools
import inspect
import os
import types
from collections import Counter

os.environ.setdefault("KVCLUSTER_TEST_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", os.environ["KVCLUSTER_TEST_THREADS"])
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
torch.set_num_threads(int(os.environ["KVCLUSTER_TEST_THREADS"]))
hypothesis.settings.register_profile("kvcluster", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("kvcluster")


@pytest.fixture(
    scope="session",
    params=[
        pytest.param("smollm2", marks=[pytest.mark.slow, pytest.mark.xdist_group("smollm2")]),
        pytest.param("gemma3-270m", marks=[pytest.mark.slow, pytest.mark.xdist_group("gemma3")]),
    ],
)
def real_model(request):
    """The name of each real model in turn; Gemma's tests are skipped where `make gemma` has not been run."""
    from kvcluster.evaluation.models import model_folder

    try:
        model_folder(request.param)
    except FileNotFoundError as error:
        if request.param == "smollm2" or "is not installed" not in str(error):
            raise
        pytest.skip(f"needs Gemma: {error}")
    return request.param


@pytest.fixture
def few_programs(monkeypatch):
    """Triton's interpreter is slow per program, not per number: a whole chunk in one, and its lookups remembered."""
    if torch.cuda.is_available():
        return
    import triton.language as tl
    from triton.runtime import interpreter

    from kvcluster.fast.kernels import assign, attended_matching, attention, likeness, match, merge, score, select

    for module, name in (
        (match, "BLOCK_ROWS"),
        (match, "BLOCK_COLUMNS"),
        (score, "BLOCK_SOURCES"),
        (attended_matching, "BLOCK_TOKENS"),
        (assign, "BLOCK_ROWS"),
        (assign, "BLOCK_COLUMNS"),
        (assign, "BLOCK_SCORED"),
        (select, "BLOCK_CLUSTERS"),
    ):
        monkeypatch.setattr(module, name, 128)
    monkeypatch.setattr(match, "BLOCK_SCORED", 128)
    monkeypatch.setattr(likeness, "BLOCK_TOKENS", 64)
    monkeypatch.setattr(attention, "SPLIT", 2048)
    monkeypatch.setattr(attention, "entries_of_step", lambda *_: 128)
    monkeypatch.setattr(merge, "BLOCK_ENTRIES", 4096)
    monkeypatch.setattr(inspect, "getmembers", functools.cache(inspect.getmembers))
    # Each call of a device function would patch `triton.language` again: a launch patches all of it, a call nothing.
    patch, language = interpreter._patch_lang, types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    monkeypatch.setattr(interpreter, "_patch_lang", lambda fn: patch(language))
    call = lambda self, *args, **given: self.rewrite()(*args, **given)  # noqa: E731
    monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", call)


def pytest_terminal_summary(terminalreporter):
    """Say how many kernel tests really ran, what the fuzz compared, what faults left of caches, and what was soaked."""
    passed = terminalreporter.stats.get("passed", [])
    kernels = sum("kernels" in report.nodeid or "[triton" in report.nodeid for report in passed)
    rows = sum(value for report in passed for name, value in report.user_properties if name == "rows")
    where = "on CUDA" if torch.cuda.is_available() else "in Triton's interpreter, none on a GPU"
    terminalreporter.write_line(f"Kernel tests that ran: {kernels}, {where}. Fuzzed rows compared: {rows:,}")
    calls, faults, soaked = (sum_of(passed, name) for name in ("calls", "faults", "soak"))
    if calls:
        said = ", ".join(f"{outcome} {n:,}" for outcome, n in sorted(calls.items()))
        terminalreporter.write_line(f"Fuzzed calls, reference against fast: {calls.total():,}, all alike: {said}")
    if faults:
        left = ", ".join(f"{outcome} {n:,}" for outcome, n in sorted(faults.items()))
        terminalreporter.write_line(f"Faults in changes of caches: {faults.total():,}, none silent. Left: {left}")
    if soaked:
        steps = ", ".join(f"{name} {n:,}" for name, n in sorted(soaked.items()) if name not in ("runs", "caches"))
        runs, caches = soaked["runs"], soaked["caches"]
        terminalreporter.write_line(f"Soak: {runs:,} runs, {caches:,} caches, none as it should not be. {steps}")


def sum_of(reports, name):
    """The counts that tests have recorded under a name, together."""
    return sum(
        (Counter(value) for report in reports for key, value in report.user_properties if key == name), Counter()
    )
