"""Triton against the NumPy reference and torch on the CPU: labels, counts, centroids and caches, bit for bit."""

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.keys import DTYPES, KINDS, make_keys, same_bits, to_float32
from kvcluster import fast, reference

__all__ = ["Case", "compare_all"]

KEEP_RATIOS = (0.5, 0.25, 0.2)  # one round, two, three
OFTEN = ("normal", "signs")  # kinds whose largest chunks are compared at every ratio; the rest at the last


@dataclass(frozen=True)
class Case:
    """One problem; `is_strided` keys are a transposed view, as the projections of a model give them."""

    kind: str
    dtype: str
    dim: int
    chunk_size: int
    keep_ratio: float
    is_strided: bool = False


def cases(interpret: bool) -> Iterator[Case]:
    """Every dtype, dim, chunk size and keep ratio with keys of every kind; for the interpreter, a few of these."""
    dims, sizes, ratios = ((64, 80, 128, 256), (8, 64, 512), KEEP_RATIOS)
    if interpret:
        dims, sizes, ratios = (20,), (10,), (0.2,)  # 10 entries, then 5, 3 and 2: all that a round can be
    for dtype, dim, chunk_size in itertools.product(DTYPES, dims, sizes):
        for kind in KINDS:
            for keep_ratio in ratios if kind in OFTEN or chunk_size < 512 else ratios[-1:]:
                yield Case(kind, dtype, dim, chunk_size, keep_ratio)
        yield Case("normal", dtype, dim, chunk_size, ratios[-1], is_strided=True)


def compare_all(interpret: bool) -> list[dict[str, Any]]:
    """Checks and differences by dtype and kind; every differing case is named as soon as it is found."""
    device = "cpu" if interpret else "cuda"
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    start = time.perf_counter()
    for case in cases(interpret):
        if interpret and case.kind == "tiny" and case.dtype == "bf16":
            continue
        note(rows, case.dtype, "strided" if case.is_strided else case.kind, case, compare(case, device))
    for dtype in DTYPES:
        for n_shared in (None, 2):
            checks = compare_caches(dtype, device, 8 if interpret else 128, n_shared)
            note(rows, dtype, "cache", (dtype, n_shared), checks)
    print(f"{'dtype':6} {'keys':12} {'cases':>6} {'checks':>7} {'differing':>10}")
    for row in rows.values():
        print(f"{row['dtype']:6} {row['keys']:12} {row['cases']:6} {row['checks']:7} {row['differing']:10}")
    if interpret:
        print("Left out: tiny bf16 keys; Triton's interpreter reads subnormal bfloat16 numbers wrongly.")
    print(f"agreement took {time.perf_counter() - start:.0f} s", flush=True)
    return list(rows.values())


def note(
    rows: dict[tuple[str, str], dict[str, Any]], dtype: str, keys: str, case: Any, checks: dict[str, bool]
) -> None:
    row = rows.setdefault((dtype, keys), {"dtype": dtype, "keys": keys, "cases": 0, "checks": 0, "differing": 0})
    differing = [name for name, holds in checks.items() if not holds]
    row["cases"] += 1
    row["checks"] += len(checks)
    row["differing"] += len(differing)
    if differing:
        print(f"DIFFERS: {case}: {', '.join(differing)}", flush=True)


def compare(case: Case, device: str) -> dict[str, bool]:
    """Which of the results of the kernels have the bits of the reference, and of torch on the CPU."""
    chunks = 5 if case.chunk_size == 64 else 2
    shape = (1, 2, chunks * case.chunk_size, case.dim)
    keys = make_keys(case.kind, shape, DTYPES[case.dtype], seed=case.dim + case.chunk_size)
    expected = reference.chunked_soft_matching(to_float32(keys), keep_ratio=case.keep_ratio, chunk_size=case.chunk_size)
    centroids = reference.merge(to_float32(keys), expected)
    there = keys.to(device)
    if case.is_strided:
        there = there.transpose(1, 2).contiguous().transpose(1, 2)
    parameters = {"keep_ratio": case.keep_ratio, "chunk_size": case.chunk_size}
    ours = fast.chunked_soft_matching(there, **parameters, backend="triton")
    checks = {
        "labels": same_bits(ours.labels, expected.labels),
        "counts": same_bits(ours.counts, expected.counts),
        "centroids": same_bits(fast.merge(there, ours, backend="triton"), centroids),
    }
    target = centroids.shape[-2] // chunks
    return checks | compare_compressed(there, keys, target, case.chunk_size) | compare_distinctive(there, keys, case)


def compare_compressed(there: Tensor, keys: Tensor, target: int, chunk_size: int) -> dict[str, bool]:
    """The same for what the cache calls: one call for labels, counts and centroids of keys and of values."""
    values = other_values(keys)
    ours = fast.SoftMatching().compress(
        there, values.to(there.device), chunk_size=chunk_size, target=target, backend="triton"
    )
    torch_s = fast.SoftMatching().compress(keys, values, chunk_size=chunk_size, target=target, backend="torch")
    names = ("labels", "counts", "keys", "values")
    return {f"compress {name}": same_bits(getattr(ours, name), getattr(torch_s, name)) for name in names}


def other_values(keys: Tensor) -> Tensor:
    """Values that are exact in every dtype: -2 * keys or, where that is infinite, the keys."""
    values = -2 * keys
    return torch.where(values.isfinite(), values, keys)


def compare_distinctive(there: Tensor, keys: Tensor, case: Case) -> dict[str, bool]:
    """The same for distinctive matching, whose values are not the keys, against the reference."""
    values = other_values(keys).flip(-2)
    arrays = [to_float32(array) for array in (keys, values)]
    clustering = reference.distinctive_matching(*arrays, keep_ratio=case.keep_ratio, chunk_size=case.chunk_size)
    target = clustering.counts.shape[-1] * case.chunk_size // keys.shape[-2]
    sizes = {"chunk_size": case.chunk_size, "target": target}
    ours = fast.Distinctive(n_shared=4).compress(there, values.to(there.device), **sizes, backend="triton")
    expected = {"labels": clustering.labels.reshape(-1, case.chunk_size) % target}
    expected["counts"] = clustering.counts.reshape(-1, target)
    for name, array in zip(("keys", "values"), arrays, strict=True):
        expected[name] = reference.merge(array, clustering).reshape(-1, target, case.dim)
    return {f"distinctive {name}": same_bits(getattr(ours, name), array) for name, array in expected.items()}


def compare_caches(dtype: str, device: str, dim: int, n_shared: int | None) -> dict[str, bool]:
    """A cache filled in three steps, by distinctive matching if there is `n_shared`.

    The reference's holds float32 and is rounded here as a cache rounds.
    """
    rules = {"keep_ratio": 0.25, "chunk_size": 16, "n_recent": 20}
    methods = [(m.SoftMatching() if n_shared is None else m.Distinctive(n_shared)) for m in (fast, reference)]
    ours = fast.ClusteredCache(**rules, method=methods[0], backend="triton")
    expected = reference.ClusteredCache(**rules, method=methods[1])
    keys, values = (make_keys("normal", (2, 2, 100, dim), DTYPES[dtype], seed=seed) for seed in (1, 2))
    for first, last in ((0, 70), (70, 71), (71, 100)):
        ours.append(keys[..., first:last, :].to(device), values[..., first:last, :].to(device))
        expected.append(to_float32(keys[..., first:last, :]), to_float32(values[..., first:last, :]))
    checks = {"counts": same_bits(ours.counts, expected.counts)}
    for name in ("keys", "values"):
        rounded = torch.from_numpy(getattr(expected, name)).to(DTYPES[dtype])
        checks[name] = same_bits(getattr(ours, name), rounded)
    return checks
