"""Speed on CUDA, by the device's own clock: compression by kernels, plain float32 torch, and reading the keys once."""

import platform
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton

from benchmarks.gpu.keys import DTYPES
from benchmarks.matching.plain import plain_compress
from kvcluster.fast import Distinctive, SoftMatching

__all__ = ["describe_device", "print_distinctive_timings", "print_timings", "time_all", "time_distinctive"]

SHAPES = ((1, 8, 32_768, 128), (8, 8, 32_768, 128))  # batch, heads, tokens, dim
CHUNK_SIZE, TARGET = 64, 16
METHOD = Distinctive(n_shared=4)
DISTINCTIVE = {"chunk_size": 256, "target": 64}
WARM_UPS, ROUNDS = 3, 20


def describe_device(interpret: bool) -> dict[str, Any]:
    """What the results depend on."""
    return {
        "device": "none (interpreted on the CPU)" if interpret else torch.cuda.get_device_name(),
        "capability": None if interpret else list(torch.cuda.get_device_capability()),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def milliseconds_in_turn(contenders: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Times of each contender in each of ROUNDS turns (A B C, A B C, ...), between two events of the stream."""
    milliseconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(WARM_UPS + ROUNDS):
        for name, run in contenders.items():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            stop.record()
            torch.cuda.synchronize()
            if turn >= WARM_UPS:
                milliseconds[name].append(start.elapsed_time(stop))
    return milliseconds


def time_all() -> list[dict[str, Any]]:
    """One row for every shape and dtype: medians, the ratios within each turn, and bytes a second of the reading."""
    rows = []
    for shape in SHAPES:
        for name, dtype in DTYPES.items():
            keys = torch.randn(shape, device="cuda", generator=torch.Generator("cuda").manual_seed(0)).to(dtype)
            rows.append({"shape": list(shape), "dtype": name, **time_one(keys)})
            del keys
            torch.cuda.empty_cache()
    return rows


def time_one(keys: torch.Tensor) -> dict[str, Any]:
    contenders = {
        "kernels": lambda: SoftMatching().compress(keys, None, chunk_size=CHUNK_SIZE, target=TARGET, backend="triton"),
        "plain": lambda: plain_compress(keys, CHUNK_SIZE, TARGET),
        "read": lambda: keys.amax(),
    }
    milliseconds = milliseconds_in_turn(contenders)
    ratios = [ours / theirs for ours, theirs in zip(milliseconds["kernels"], milliseconds["plain"], strict=True)]
    medians = {name: statistics.median(times) for name, times in milliseconds.items()}
    compressed = contenders["kernels"]()
    return {
        "milliseconds": milliseconds,
        "median_milliseconds": medians,
        "ratio_to_plain": [statistics.median(ratios), min(ratios), max(ratios)],
        "ratio_to_reading": medians["kernels"] / medians["read"],
        "read_bytes_per_second": keys.nbytes / (medians["read"] / 1e3),
        "scored_rows": compressed.n_scored_rows,
        "rows": compressed.n_rows,
    }


def print_timings(rows: list[dict[str, Any]]) -> None:
    """A plain table: milliseconds, ratios, and the bandwidth that one reading of the keys reached."""
    print(f"\nchunk {CHUNK_SIZE} to {TARGET} entries, keys only; medians of {ROUNDS} turns; plain: float32 torch")
    head = (
        "shape",
        "dtype",
        "kernels ms",
        "plain ms",
        "read ms",
        "kernels/plain (range)",
        "kernels/read",
        "GB/s",
        "scored",
    )
    form = "{:20} {:6} {:>11} {:>9} {:>8} {:>22} {:>13} {:>6} {:>8}"
    print(form.format(*head))
    for row in rows:
        medians = row["median_milliseconds"]
        cells = [" x ".join(map(str, row["shape"])), row["dtype"]]
        cells += [f"{medians[name]:.3f}" for name in ("kernels", "plain", "read")]
        cells.append("{:.2f} ({:.2f} to {:.2f})".format(*row["ratio_to_plain"]))
        cells += [f"{row['ratio_to_reading']:.1f}", f"{row['read_bytes_per_second'] / 1e9:.0f}"]
        print(form.format(*cells, f"{row['scored_rows'] / row['rows']:.3%}"))


def time_distinctive() -> list[dict[str, Any]]:
    """One row for every shape and dtype: distinctive matching of keys and values by kernels and by torch."""
    rows = []
    for shape in SHAPES:
        for name, dtype in DTYPES.items():
            generator = torch.Generator("cuda").manual_seed(0)
            arrays = [torch.randn(shape, device="cuda", generator=generator).to(dtype) for _ in range(2)]
            contenders = {
                "kernels": lambda kv=arrays: METHOD.compress(*kv, **DISTINCTIVE, backend="triton"),
                "torch": lambda kv=arrays: METHOD.compress(*kv, **DISTINCTIVE, backend="torch"),
                "read": lambda kv=arrays: [x.amax() for x in kv],
            }
            milliseconds = milliseconds_in_turn(contenders)
            medians = {contender: statistics.median(times) for contender, times in milliseconds.items()}
            rows.append(
                {"shape": list(shape), "dtype": name, "milliseconds": milliseconds, "median_milliseconds": medians}
            )
            del arrays, contenders
            torch.cuda.empty_cache()
    return rows


def print_distinctive_timings(rows: list[dict[str, Any]]) -> None:
    """A plain table."""
    sizes = "chunk {chunk_size} to {target} entries, 4 of them shared".format(**DISTINCTIVE)
    print(f"\ndistinctive matching of keys and values, {sizes}; medians of {ROUNDS} turns; torch: on the same device")
    form = "{:20} {:6} {:>11} {:>9} {:>8} {:>14} {:>13}"
    print(form.format("shape", "dtype", "kernels ms", "torch ms", "read ms", "kernels/torch", "kernels/read"))
    for row in rows:
        medians = row["median_milliseconds"]
        cells = [" x ".join(map(str, row["shape"])), row["dtype"]]
        cells += [f"{medians[name]:.3f}" for name in ("kernels", "torch", "read")]
        print(form.format(*cells, *(f"{medians['kernels'] / medians[name]:.2f}" for name in ("torch", "read"))))
