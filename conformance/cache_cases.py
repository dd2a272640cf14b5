"""The cases of caches: tokens that come in pieces, then a query."""

from collections.abc import Iterator
from typing import Any

from .case import Case
from .inputs import DTYPES, attention_arrays

__all__ = ["clustered_cache_cases", "recall_cache_cases"]


def clustered_cache_cases(base: int) -> Iterator[Case]:
    plan = {"keep_ratio": 0.25, "chunk_size": 16, "n_sink": 3, "n_recent": 20}
    for index, (dtype, kind) in enumerate((d, k) for d in DTYPES for k in ("smooth", "signs", "normal")):
        arrays = attention_arrays(kind, (2,), 3, 150, 16, dtype, base + 110 + index)
        for name, pieces in (("prompt", (150,)), ("split", (1, 2, 60, 1, 0, 37, 49)), ("tokens", (100, *[1] * 50))):
            yield Case("ClusteredCache", f"{kind}-{name}-{dtype}", arrays, {**plan, "pieces": pieces})
    arrays = attention_arrays("normal", (1, 2), 2, 200, 8, "f32", base + 120)
    changes: dict[str, dict[str, Any]] = {
        "defaults": {"keep_ratio": 0.25},
        "keep-all": {**plan, "keep_ratio": 1.0},
        "no-sink": {**plan, "n_sink": 0},
        "no-recent": {**plan, "n_recent": 0},
        "just-due": {**plan, "n_sink": 4, "pieces": (4 + 20 + 16 * 3, 15, 1)},
        "three-rounds": {**plan, "keep_ratio": 0.2, "chunk_size": 13},
    }
    for name, changed in changes.items():
        yield Case("ClusteredCache", name, arrays, {"pieces": (120, 80), **changed})
    short = attention_arrays("normal", (1,), 1, 5, 8, "f32", base + 121)
    yield Case("ClusteredCache", "shorter-than-sinks", short, {**plan, "n_sink": 9, "pieces": (2, 3)})
    yield Case("ClusteredCache", "scale", arrays, {**plan, "scale": 0.7, "pieces": (200,)})
    yield from distinctive_cache_cases(base)
    yield from budget_cache_cases(base)


def distinctive_cache_cases(base: int) -> Iterator[Case]:
    plan = {"keep_ratio": 0.4, "chunk_size": 20, "n_sink": 3, "n_recent": 9, "n_shared": 3}
    for index, (dtype, kind) in enumerate((d, k) for d in DTYPES for k in ("smooth", "signs", "normal")):
        arrays = attention_arrays(kind, (2,), 3, 110, 16, dtype, base + 160 + index)
        pieces = ((110,), (1, 2, 60, 0, 47), (70, *[1] * 40))[index % 3]
        yield Case("ClusteredCache", f"{kind}-shared3-{dtype}", arrays, {**plan, "pieces": pieces})
    arrays = attention_arrays("normal", (2, 2), 2, 110, 8, "f32", base + 170)  # batch rows and heads
    yield Case("ClusteredCache", "shared-in-batch-rows", arrays, {**plan, "pieces": (100, 10)})


def budget_cache_cases(base: int) -> Iterator[Case]:
    plan = {"keep_ratio": 0.25, "chunk_size": 16, "n_sink": 3, "n_recent": 20}  # with 42 entries, one span
    for index, (dtype, kind) in enumerate((d, k) for d in DTYPES for k in ("smooth", "signs", "normal")):
        arrays = attention_arrays(kind, (2,), 3, 190, 16, dtype, base + 180 + index)
        budget = (54, 46, 63)[index // 3]
        changed = {**plan, "budget": budget, "pieces": ((190,), (90, *[1] * 40, 0, 60))[index % 2]}
        yield Case("ClusteredCache", f"{kind}-budget{budget}-{dtype}", arrays, changed)
    arrays = attention_arrays("normal", (1, 2), 2, 150, 8, "f32", base + 190)
    changes: dict[str, dict[str, Any]] = {
        "budget-least": {**plan, "budget": 42},
        "budget-never-reached": {**plan, "budget": 150},
        "budget-keep-all": {**plan, "keep_ratio": 1.0, "budget": 90},
        "budget-no-sink-no-recent": {**plan, "n_sink": 0, "n_recent": 0, "budget": 30},
    }
    for name, changed in changes.items():
        yield Case("ClusteredCache", name, arrays, {**changed, "pieces": (110, 40)})


def recall_cache_cases(base: int) -> Iterator[Case]:
    plan = {"budget": 40, "n_sink": 4, "n_recent": 2, "tokens_per_cluster": 4}
    plan |= {"segment_size": 16, "prompt_segment_size": 32}
    for index, (dtype, kind) in enumerate((d, k) for d in DTYPES for k in ("smooth", "signs")):
        arrays = attention_arrays(kind, (2,), 3, 150, 16, dtype, base + 130 + index)
        for name, pieces in (("prompt", (150,)), ("tokens", (101, *[1] * 49)), ("pieces", (1, 60, 0, 40, 49))):
            yield Case("RecallCache", f"{kind}-{name}-{dtype}", arrays, {**plan, "pieces": pieces})
    arrays = attention_arrays("smooth", (1, 2), 2, 200, 8, "f32", base + 140)
    changes: dict[str, dict[str, Any]] = {
        "absolute-segments": {**plan, "prompt_segment_size": 0},
        "one-segment": {**plan, "prompt_segment_size": None},
        "no-spread": {**plan, "spread": 0.0},
        "centred": {**plan, "is_centred": True},
        "rest": {**plan, "centroids_for_rest": True},
        "budget-covers-all": {**plan, "budget": 300},
        "scale": {**plan, "scale": 0.7},
    }
    for name, changed in changes.items():
        yield Case("RecallCache", name, arrays, {**changed, "pieces": (150, 1, 49)})
