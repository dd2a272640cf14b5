"""Clustered attention in C++, compiled for this processor at its first use and kept in the user's cache folder.

Plain C++ with the vector types of GCC and Clang and OpenMP, called through ctypes: no header of PyTorch is needed, so
that compiling takes about a second. The folder is `platformdirs.user_cache_path("kvcluster")`; a file's name holds a
hash of the source, of the flags and of what the compiler says of itself and of this processor, so none is ever stale.
"""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from platformdirs import user_cache_path
from torch import Tensor

__all__ = ["DTYPES", "LANES", "attend", "compiler", "library"]

SOURCE = Path(__file__).parent / "attention.cpp"
FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"),
    # Not -ffast-math: linked into a library, it would make the whole process flush subnormal numbers to zero.
    *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
)
DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
LANES = 16  # dim must be a multiple of it


@functools.cache
def compiler() -> str | None:
    """The C++ compiler: the environment's `CXX`, else c++, g++ or clang++; None if there is none."""
    names = (os.environ.get("CXX"), "c++", "g++", "clang++")
    return next((found for name in names if name and (found := shutil.which(name))), None)


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled library.

    Raises
    ------
    ModuleNotFoundError : no C++ compiler is installed.
    RuntimeError : the compiler failed; its message is quoted.
    """
    program = compiler()
    if program is None:
        raise ModuleNotFoundError("backend 'cpp' needs a C++ compiler (c++, g++, clang++ or CXX in the environment)")
    about = run([program, "-march=native", "-fopenmp", "-dM", "-E", "-x", "c++", os.devnull])
    key = hashlib.sha256(SOURCE.read_bytes() + " ".join(FLAGS).encode() + about).hexdigest()[:16]
    made = user_cache_path("kvcluster") / f"attention-{key}.so"
    if not made.exists():
        made.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=made.parent) as folder:  # whole or not at all, whoever else compiles now
            fresh = Path(folder) / made.name
            run([program, *FLAGS, str(SOURCE), "-o", str(fresh)])
            fresh.replace(made)
    return ctypes.CDLL(str(made))


def run(command: list[str]) -> bytes:
    """What `command` prints."""
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"the C++ compiler failed: {' '.join(command)}\n{done.stderr.decode(errors='replace')}")
    return done.stdout


def attend(query: Tensor, keys: Tensor, values: Tensor, counts: Tensor | None, queries: int, scale: float) -> Tensor:
    """Attention output (batch, heads, rows, dim), in the dtype of `query`.

    Parameters
    ----------
    query : (batch, heads, rows, dim); row r belongs to new token r % queries.
    keys, values : (batch, heads, entries, dim), of one dtype; dim a multiple of LANES. Copied where features or
        entries do not lie side by side.
    counts : (batch, heads, entries), int32; None where every count is 1.
    queries : how many of the entries, the last ones, are the new tokens; each row sees the entries up to its own.
    """
    batch, heads, rows, dim = query.shape
    scaled = (query.float() * scale).contiguous()
    keys, values = (x if x.stride(-1) == 1 else x.contiguous() for x in (keys, values))
    if counts is not None and counts.stride(-1) != 1:
        counts = counts.contiguous()
    output = torch.empty_like(scaled)
    strides = (*keys.stride()[:3], *values.stride()[:3], *(counts.stride()[:2] if counts is not None else (0, 0)))
    shape = (batch * heads, heads, rows, queries, keys.shape[2], dim, torch.get_num_threads(), *strides)
    getattr(library(), f"kvcluster_attend_{DTYPES[keys.dtype]}")(
        (ctypes.c_int64 * len(shape))(*shape),
        *(ctypes.c_void_p(x.data_ptr()) for x in (scaled, keys, values)),
        ctypes.c_void_p(counts.data_ptr() if counts is not None else None),
        ctypes.c_void_p(output.data_ptr()),
    )
    return output.to(query.dtype)
