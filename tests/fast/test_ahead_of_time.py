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
print(json.dumps([dataclasses.asdict(made) for made in compile_all(({target!r},), {dim})]))
"""
PACKED = """
import dataclasses, json
from kvcluster.fast.exact.blocks import BlockLayout
from kvcluster.fast.kernels.ahead_of_time import TARGETS, compile_one, packed_source
every = []
for bits in (8, 4, 3, 2):
    for rows in (4, 16):
        code = packed_source("bfloat16", TARGETS[{target!r}][0].backend, BlockLayout({dim}, {dim}, (bits, bits)), rows)
        made = compile_one("attend_packed", *code, "bfloat16", {target!r}, {dim})
        every.append(dict(bits=bits, rows=rows, **dataclasses.asdict(made)))
print(json.dumps(every))
"""
SMALLEST_SHARED_MEMORY = 48 * 1024  # of a block, without asking for more, on every CUDA target
# Of a block that asks for more, as Triton does: the least since sm_80, which sm_86 has, and that of gfx942.
ASKED_SHARED_MEMORY = {"cuda": 99 * 1024, "hip": 64 * 1024}


def compiled(code, target, dim):
    """In a process of its own: this one may have replaced the compiler by the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", code.format(target=target, dim=dim)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def shared_memory(target, dim):
    """The most that a block may ask for."""
    if dim < 256:
        return SMALLEST_SHARED_MEMORY
    return ASKED_SHARED_MEMORY["cuda" if target.startswith("sm_") else "hip"]


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_kernels_compile_without_spilling(target, dim):
    """With heads of 256 features, as Gemma's are, some blocks ask for more shared memory, and get it everywhere."""
    every, most = compiled(CODE, target, dim), shared_memory(target, dim)
    assert len(every) == 3 * len({made["kernel"] for made in every})
    names = {"match", "score", "likeness", "dots", "merge", "merge_weighted"}
    names |= {"attend", "attend_ragged", "attend_packed", "combine", "assign", "settle", "select", "recall"}
    assert names == {made["kernel"] for made in every}
    for made in every:
        assert made["spills"] == 0, made
        assert made["shared"] <= most, made
        if made["kernel"] in ("match", "attend", "attend_ragged", "assign", "recall") and made["dtype"] != "float32":
            assert made["tensor_core_products"] > 0, made
            assert made["wide_loads"] > 0, made


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_attention_to_codes_of_any_bits_compiles_without_spilling(target, dim):
    """With few query rows and with many; four of them read the bytes of 8 and 4 bits sixteen at once on CUDA."""
    every, most = compiled(PACKED, target, dim), shared_memory(target, dim)
    assert len(every) == 8
    for made in every:
        assert made["spills"] == 0, made
        assert made["shared"] <= most, made
        if target.startswith("sm_") and made["bits"] >= 4 and made["rows"] == 4:
            assert made["wide_loads"] > 0, made


def test_the_compiler_is_not_asked_while_it_is_replaced():
    from kvcluster.fast.kernels.ahead_of_time import compile_all

    with pytest.raises(RuntimeError, match="ahead-of-time compilation needs TRITON_INTERPRET unset"):
        next(compile_all())
