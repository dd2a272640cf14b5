"""The kernels on a CUDA machine: `make gpu`, or `python benchmarks/gpu/run.py`.

Compares Triton on CUDA with the NumPy reference and with torch on the CPU, bit for bit, and attention within its bound;
then times both beside plain torch on the same GPU. Needs torch (2.11 or later), triton (3.6 or later) and NumPy, and
nothing else; no network. Prints tables and writes JSON. The exit status is 1 where anything differs, and where there is
no CUDA device. `--interpret` is a dry run on the CPU in Triton's interpreter: tiny problems, no timings, nothing runs
on a GPU.
"""

import argparse
import functools
import importlib.util
import inspect
import json
import os
import sys
import time
import types
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # of a script only its own folder is on the path

__all__ = ["main"]

RESULTS = Path(__file__).resolve().parent / "results" / "measured.json"


def main() -> int:
    """Run everything; the exit status."""
    parser = argparse.ArgumentParser(description="Agreement and speed of the Triton kernels on a CUDA device.")
    parser.add_argument("--json", type=Path, default=RESULTS, metavar="FILE", help="where the numbers go")
    parser.add_argument("--interpret", action="store_true", help="dry run on the CPU, without a GPU")
    arguments = parser.parse_args()
    if arguments.interpret:
        os.environ["TRITON_INTERPRET"] = "1"
    else:
        os.environ.pop("TRITON_INTERPRET", None)  # it would replace the compiler
    if importlib.util.find_spec("jaxtyping") is None:
        stand_in_for_jaxtyping()
    import torch

    if not arguments.interpret and not torch.cuda.is_available():
        print(
            "benchmarks/gpu/run.py: no CUDA device: torch.cuda.is_available() is False, so nothing was checked.",
            file=sys.stderr,
        )
        print(
            "A dry run on the CPU, which proves nothing about a GPU: benchmarks/gpu/run.py --interpret", file=sys.stderr
        )
        return 1
    return run(arguments.interpret, arguments.json)


def stand_in_for_jaxtyping() -> None:
    """A module `jaxtyping` whose every name gives `Any` for every shape; only the tests check shapes."""

    class Anything:
        def __class_getitem__(cls, shape: Any) -> Any:
            return Any

    def any_shape(name: str) -> type:
        if name.startswith("__"):  # what Python itself asks of a module
            raise AttributeError(name)
        return Anything

    module = types.ModuleType("jaxtyping")
    module.__getattr__ = any_shape
    sys.modules["jaxtyping"] = module


def make_the_interpreter_bearable() -> None:
    """Remember its look-ups, and give no warning where a filter overflows on huge keys."""
    inspect.getmembers = functools.cache(inspect.getmembers)
    warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton.runtime.interpreter")


def run(interpret: bool, file: Path) -> int:
    """Compare, time, print, write; the exit status."""
    from benchmarks.gpu.agreement import compare_all
    from benchmarks.gpu.attention import compare_attention, print_attention_timings, time_attention
    from benchmarks.gpu.packed import compare_packed_attention, print_packed_timings, time_packed_attention
    from benchmarks.gpu.timings import (
        describe_device,
        print_distinctive_timings,
        print_timings,
        time_all,
        time_distinctive,
    )

    start = time.perf_counter()
    results = {"interpreted": interpret, **describe_device(interpret)}
    print("\n".join(f"{name}: {value}" for name, value in results.items()), flush=True)
    if interpret:
        make_the_interpreter_bearable()
        print("\n*** DRY RUN: Triton's interpreter on the CPU. NOTHING RAN ON A GPU. ***\n", flush=True)
    results["agreement"] = compare_all(interpret) + compare_attention(interpret)
    results["agreement"] += compare_packed_attention(interpret)
    results["timings"] = [] if interpret else time_all()
    results["distinctive_timings"] = [] if interpret else time_distinctive()
    results["attention_timings"] = [] if interpret else time_attention()
    results["packed_timings"] = [] if interpret else time_packed_attention()
    if interpret:
        print("\nTimings: none, for nothing ran on a GPU.")
    else:
        print_timings(results["timings"])
        print_distinctive_timings(results["distinctive_timings"])
        print_attention_timings(results["attention_timings"])
        print_packed_timings(results["packed_timings"])
    results["seconds"] = round(time.perf_counter() - start, 1)
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(results, indent=1) + "\n")
    differing = sum(row["differing"] for row in results["agreement"])
    checks = sum(row["checks"] for row in results["agreement"])
    where = "in Triton's interpreter, NONE ON A GPU" if interpret else f"on {results['device']}"
    print(f"\n{checks - differing:,} of {checks:,} checks agree, attention within its bound and all else bit for bit,")
    print(f"{where}; {results['seconds']} s; {file}")
    return 1 if differing else 0


if __name__ == "__main__":
    raise SystemExit(main())
