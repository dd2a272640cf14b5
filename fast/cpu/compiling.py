"""C++ of this folder, compiled for this processor at its first use and kept in the user's cache folder.

Plain C++ with the vector types of GCC and Clang and OpenMP, called through ctypes: no header of PyTorch is needed, so
that compiling takes about a second. The folder is `platformdirs.user_cache_path("kvcluster")`; a file's name holds a
hash of the sources, of the flags and of what the compiler says of itself and of this processor, so none is ever stale.
"""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from torch import Tensor

__all__ = ["call", "compiler", "library", "pointers"]

FOLDER = Path(__file__).parent
FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"),
    # Not -ffast-math: linked into a library, it would make the whole process flush subnormal numbers to zero.
    *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
)


@functools.cache
def compiler() -> str | None:
    """The C++ compiler: the environment's `CXX`, else c++, g++ or clang++; None if there is none."""
    names = (os.environ.get("CXX"), "c++", "g++", "clang++")
    return next((path for name in names if name and (path := shutil.which(name))), None)


@functools.cache
def library(name: str) -> ctypes.CDLL:
    """`name`.cpp, compiled.

    Raises
    ------
    ModuleNotFoundError : no C++ compiler is installed.
    RuntimeError : the compiler failed; its message is quoted.
    """
    program = compiler()
    if program is None:
        raise ModuleNotFoundError("backend 'cpp' needs a C++ compiler (c++, g++, clang++ or CXX in the environment)")
    from platformdirs import user_cache_path  # not asked for on a CUDA machine

    sources = b"".join(path.read_bytes() for path in sorted(FOLDER.glob("*.[ch]*")))
    about = run([program, "-march=native", "-fopenmp", "-dM", "-E", "-x", "c++", os.devnull])
    key = hashlib.sha256(sources + " ".join(FLAGS).encode() + about).hexdigest()[:16]
    compiled = user_cache_path("kvcluster") / f"{name}-{key}.so"
    if not compiled.exists():
        compiled.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=compiled.parent) as folder:  # whole or not at all, if others compile too
            fresh = Path(folder) / compiled.name
            run([program, *FLAGS, str(FOLDER / f"{name}.cpp"), "-o", str(fresh)])
            fresh.replace(compiled)
    return ctypes.CDLL(str(compiled))


def call(file: str, name: str, shape: tuple[int, ...], *arrays: Tensor) -> None:
    """`kvcluster_<name>` of `file`.cpp with numbers and pointers to the arrays, which are contiguous."""
    assert all(array.is_contiguous() for array in arrays)
    getattr(library(file), f"kvcluster_{name}")((ctypes.c_int64 * len(shape))(*shape), *pointers(*arrays))


def pointers(*arrays: Tensor | None) -> list[ctypes.c_void_p]:
    """Where the numbers of each array lie, which C++ reads as they are; null for None.

    Raises
    ------
    ValueError : an array whose numbers do not lie in this process's memory, or with the other sign.
    """
    for array in arrays:
        if array is not None and (array.device.type != "cpu" or array.is_neg()):
            raise ValueError(f"tensors for C++ must be on the CPU and no negated view, got one on {array.device}")
    return [ctypes.c_void_p(None if array is None else array.data_ptr()) for array in arrays]


def run(command: list[str]) -> bytes:
    """What `command` prints."""
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"the C++ compiler failed: {' '.join(command)}\n{done.stderr.decode(errors='replace')}")
    return done.stdout
