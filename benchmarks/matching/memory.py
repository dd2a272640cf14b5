"""Peak memory of one contender in a process of its own: `python memory.py NAME TOKENS` prints bytes above the keys.

A profiler of Python's memory sees nothing of torch's, so the operating system is asked (Linux): the largest resident
set since just before the call, less the resident set then. A small problem has been run before, so that torch has
loaded what it loads only once. Not `ru_maxrss`: a child starts with its parent's.
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # of a script only its own folder is on the path

__all__ = ["peak_bytes"]


def peak_bytes(contender: str, tokens: int) -> int:
    """Bytes that compressing random keys needs beyond the keys themselves, results included."""
    command = [sys.executable, __file__, contender, str(tokens)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if process.returncode != 0:
        raise RuntimeError(f"{contender} failed:\n{process.stderr}")
    return int(process.stdout)


def resident_bytes(name: str) -> int:
    """`VmRSS`, the resident set now, or `VmHWM`, the largest since `forget_the_largest`."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith(name))


def forget_the_largest() -> None:
    """`VmHWM` becomes `VmRSS`."""
    Path("/proc/self/clear_refs").write_text("5")


def measure(contender: str, tokens: int) -> int:
    from benchmarks.matching.contenders import CHUNK_SIZE, CONTENDERS, random_keys

    run = CONTENDERS[contender]
    for _ in range(2):
        run(random_keys(CHUNK_SIZE * 4))
    keys = random_keys(tokens)
    forget_the_largest()
    before = resident_bytes("VmRSS")
    result = run(keys)
    peak = resident_bytes("VmHWM")
    del result  # kept until here, since it counts
    return peak - before


if __name__ == "__main__":
    print(measure(sys.argv[1], int(sys.argv[2])))
