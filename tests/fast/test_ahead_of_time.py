"""Kernels compiled for GPUs that are not there: nothing spills, everything fits, tensor cores where claimed."""

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

CODE = """
import dataclasses, json
from kvcluster.fast.kernels.ahead_of_time import compile_all
for dim in (64, 128):
    print(json.dumps([dataclasses.asdict(made) for made in compile_all({targets}, dim)]))
"""
SMALLEST_SHARED_MEMORY = 48 * 1024  # of a block, without asking for more, on every CUDA target


def compiled(*targets):
    """In a process of its own: this one may have replaced the compiler by the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", CODE.format(targets=targets)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    return [made for line in done.stdout.splitlines() for made in json.loads(line)]


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_kernels_compile_without_spilling(target):
    every = compiled(target)
    assert len(every) == 2 * 3 * len({made["kernel"] for made in every})
    names = {"match", "score", "likeness", "merge", "merge_weighted"}
    names |= {"attend", "attend_ragged", "combine", "assign", "settle", "select", "recall"}
    assert names == {made["kernel"] for made in every}
    for made in every:
        assert made["spills"] == 0, made
        assert made["shared"] <= SMALLEST_SHARED_MEMORY, made
        if made["kernel"] in ("match", "attend", "attend_ragged", "assign", "recall") and made["dtype"] != "float32":
            assert made["tensor_core_products"] > 0, made
            assert made["wide_loads"] > 0, made


def test_the_compiler_is_not_asked_while_it_is_replaced():
    from kvcluster.fast.kernels.ahead_of_time import compile_all

    with pytest.raises(RuntimeError, match="ahead-of-time compilation needs TRITON_INTERPRET unset"):
        next(compile_all())
