"""C++ of this folder, compiled for this processor at its first use and kept in the user's cache folder.

Plain C++ with the vector types of GCC and Clang and OpenMP, called through ctypes: no header of PyTorch is needed, so
that compiling takes about a second. The folder is `platformdirs.user_cache_path("kvcluster")`, written by its owner
alone; a file's name holds a hash of the sources, of the flags and of what the compiler says of itself and of this
processor, so none is ever stale. A hash of the file lies beside it: what is damaged is compiled again. One process
compiles at a time, and others wait for it.
"""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

from torch import Tensor

__all__ = ["call", "compiler", "library", "pointers"]

FOLDER = Path(__file__).parent
TIME_LIMIT = 120  # seconds for one file
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
    RuntimeError : the compiler failed or takes too long, or its library cannot be kept or loaded; the reason is quoted.
    """
    program = compiler()
    if program is None:
        raise ModuleNotFoundError("backend 'cpp' needs a C++ compiler (c++, g++, clang++ or CXX in the environment)")
    from platformdirs import user_cache_path  # these are not asked for on a CUDA machine

    from ...scratch import in_turn

    sources = b"".join(path.read_bytes() for path in sorted(FOLDER.glob("*.[ch]*")))
    about = run([program, "-march=native", "-fopenmp", "-dM", "-E", "-x", "c++", os.devnull])
    key = hashlib.sha256(sources + " ".join(FLAGS).encode() + about).hexdigest()[:16]
    compiled = user_cache_path("kvcluster") / f"{name}-{key}.so"
    try:
        make_private(compiled.parent)
        if not is_whole(compiled):
            with in_turn(compiled.with_name("compiling.lock"), TIME_LIMIT):
                if not is_whole(compiled):
                    compile_into(compiled, [program, *FLAGS, str(FOLDER / f"{name}.cpp")])
        return ctypes.CDLL(str(compiled))
    except OSError as error:
        raise RuntimeError(f"compiled C++ cannot be kept in {compiled.parent}: {error}") from error


def compile_into(compiled: Path, command: list[str]) -> None:
    """Put what `command` makes, and its hash, where they belong: each whole or not at all, if others compile too."""
    from ...scratch import scratch_folder

    with scratch_folder(compiled.parent) as folder:
        fresh = folder / compiled.name
        run([*command, "-o", str(fresh)])
        fresh.chmod(0o700)
        hash_beside(fresh).write_text(hash_of(fresh))
        fresh.replace(compiled)
        hash_beside(fresh).replace(hash_beside(compiled))


def make_private(folder: Path) -> None:
    """Let nobody else write into the folder of compiled code, which is made if there is none.

    Raises
    ------
    OSError : it is another user's, or no folder.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.getuid():
        raise PermissionError(f"it is another user's, of number {status.st_uid}")
    if status.st_mode & 0o022:
        folder.chmod(0o700)
        for path in folder.glob("*.sha256"):  # of files that anybody may have written: all are compiled again
            path.unlink(missing_ok=True)


def is_whole(compiled: Path) -> bool:
    """Whether there is such a file, of this user alone, and its hash is the one beside it."""
    if not compiled.is_file() or compiled.is_symlink() or not hash_beside(compiled).is_file():
        return False
    status = compiled.stat()
    is_ours = status.st_uid == os.getuid() and not status.st_mode & 0o022
    return is_ours and hash_beside(compiled).read_text() == hash_of(compiled)


def hash_beside(compiled: Path) -> Path:
    return compiled.with_suffix(".sha256")


def hash_of(compiled: Path) -> str:
    return hashlib.sha256(compiled.read_bytes()).hexdigest()


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
    found = [ctypes.c_void_p(None if array is None else array.data_ptr()) for array in arrays]
    for pointer, array in zip(found, arrays, strict=True):
        pointer.array = array  # type: ignore[attr-defined]  # lives as long as what points to it
    return found


def run(command: list[str]) -> bytes:
    """What `command` prints."""
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=TIME_LIMIT)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"the C++ compiler took more than {TIME_LIMIT} seconds: {' '.join(command)}") from error
    if done.returncode != 0:
        raise RuntimeError(f"the C++ compiler failed: {' '.join(command)}\n{done.stderr.decode(errors='replace')}")
    return done.stdout
