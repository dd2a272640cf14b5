"""A recall cache with few bits: cases, refusals, and what goes wrong."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from kvcluster import reference
from kvcluster.reference.quantization import dequantize, quantize, within_range

from .caches import good_tokens
from .case import Case
from .changes import given, without
from .inputs import DTYPES, attention_arrays
from .mistake import Mistake, Patch

__all__ = ["cases_of_bits", "mistakes_of_bits", "refused_bits"]


def cases_of_bits(operation: str, plan: dict[str, Any], base: int) -> Iterator[Case]:
    of_both = (4, (8, 3), 2)
    for index, (dtype, kind) in enumerate((d, k) for d in DTYPES for k in ("smooth", "normal")):
        arrays = attention_arrays(kind, (2,), 3, 150, (16, 40)[index % 2], dtype, base + index)
        pieces = ((150,), (101, *[1] * 49), (1, 60, 0, 40, 49))[index // 2]
        yield Case(operation, f"bits-{kind}-{dtype}", arrays, {**plan, "bits": of_both[index % 3], "pieces": pieces})
    arrays = attention_arrays("smooth", (1, 2), 2, 200, 8, "f32", base + 6)
    changes: dict[str, dict[str, Any]] = {
        "16": {"bits": 16},
        "absolute-segments": {"prompt_segment_size": 0},
        "rest": {"centroids_for_rest": True, "bits": (4, 2)},
        "per-query-head": {"is_per_query_head": True, "bits": 3},
        "many-sinks": {"n_sink": 20, "n_recent": 3},
        "budget-covers-all": {"budget": 300},
    }
    for name, changed in changes.items():
        yield Case(operation, f"bits-{name}", arrays, {**plan, "bits": 4, **changed, "pieces": (150, 1, 49)})
    of_16 = attention_arrays("normal", (2,), 1, 150, 8, "f16", base + 7)
    ends = np.clip(of_16["keys"].astype(np.float32) * 4e4, -65504, 65504).astype(np.float16)
    largest = {**of_16, "keys": ends, "query": of_16["query"] * np.float16(2.0**-12)}
    yield Case(operation, "bits-largest-f16", largest, {**plan, "bits": 3, "pieces": (150,)})


def refused_bits(operation: str) -> Iterator[Case]:
    bits: dict[str, Any] = {"5": 5, "float": 4.0, "bool": True, "text": "4", "one": (4,), "pair-of-16": (4, 16)}
    plan = {"budget": 20, "n_sink": 2, "pieces": (8,)}
    for name, of in bits.items():
        yield Case(operation, f"refused-bits-{name}", good_tokens(), {**plan, "bits": of}, is_refused=True)
    for name in ("keys", "values"):
        arrays = good_tokens() | {name: np.full((1, 8, 4), 2e38, np.float32)}
        yield Case(operation, f"refused-bits-large-{name}", arrays, {**plan, "bits": 8}, is_refused=True)


class OfReadBack(reference.RecallCache):
    """Tokens are quantized before they are clustered."""

    def _cluster_next(self, size: int) -> None:
        super()._quantize(self.plan.n_sink + self.n_clustered, size)
        super()._cluster_next(size)

    def _quantize(self, start: int, size: int) -> None:
        pass


class ByChannel(reference.RecallCache):
    """Keys share scales channel by channel in each segment, as in a `ClusteredCache`."""

    def _quantize(self, start: int, size: int) -> None:
        if self.bits is None:
            return
        exact = self.keys[..., start : start + size, :].copy()
        super()._quantize(start, size)
        of_channels = quantize(exact.swapaxes(-1, -2), bits=self.bits[0])
        read = within_range(dequantize(of_channels, size).swapaxes(-1, -2), exact.dtype)
        self.keys[..., start : start + size, :] = read


class Exact(reference.RecallCache):
    """Keys, or values, stay as they came."""

    kept = "keys"

    def _quantize(self, start: int, size: int) -> None:
        exact = getattr(self, self.kept).copy()
        super()._quantize(start, size)
        setattr(self, self.kept, exact)


class ExactValues(Exact):
    kept = "values"


def swapped(case: Case) -> Case:
    bits = case.parameters.get("bits")
    return given(bits=bits[::-1])(case) if isinstance(bits, tuple) else case


def mistakes_of_bits(replaced: Callable[[type], tuple[Patch, ...]]) -> tuple[Mistake, ...]:
    return (
        Mistake("bits is ignored: the body is quantized", "13.16", change=without("bits")),
        Mistake("the bits of keys and of values are swapped", "13.16", change=swapped),
        Mistake("keys are not quantized: keys and values are", "13.16", replaced(Exact)),
        Mistake("values are not quantized: keys and values are", "13.16", replaced(ExactValues)),
        Mistake("keys share scales channel by channel: each token alone", "13.16", replaced(ByChannel)),
        Mistake("what is read back is clustered: tokens as they came", "13.16", replaced(OfReadBack)),
    )
