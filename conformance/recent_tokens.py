"""Recent tokens in few bits, `n_exact`: cases, refusals, and what goes wrong with them."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from kvcluster import reference

from .bits import Keep, Replace
from .caches import good_tokens
from .case import Case
from .changes import given, without
from .inputs import DTYPES, attention_arrays
from .mistake import Mistake

__all__ = ["mistakes_of_exact", "recent_cases", "refused_exact"]

RECENT_TOO: dict[str, Any] = {"chunk_size": 32, "n_sink": 3, "n_recent": 45, "n_exact": 10, "bits": 4}


def recent_cases(operation: str, keep: Keep, lead: tuple[int, ...], method: Any, seed: int) -> Iterator[Case]:
    """Recent tokens are quantized too. Eight seeds are used."""
    plan, splits = {**RECENT_TOO, **keep(0.6)}, ((190,), (0, 1, 99, 60, 30), (100, *[1] * 90))
    for index, dtype in enumerate(DTYPES):
        for place, kind in enumerate(("smooth", "normal")):
            arrays = attention_arrays(kind, lead, 2, 190, (16, 40)[place], dtype, seed + index)
            changed = {"bits": (4, (8, 3), 2)[index], "pieces": splits[(index + place) % 3]}
            yield Case(operation, f"exact-{kind}-{dtype}", arrays, {**plan, **changed})
    arrays = attention_arrays("normal", lead, 2, 190, 16, "f32", seed + 3)
    changes: dict[str, dict[str, Any]] = {
        "of-no-group": {"n_exact": 45, "pieces": (48 + 31,)},
        "of-one-group": {"n_exact": 45, "pieces": (48 + 31, 1)},
        "alone": {"n_recent": 400},
        "nothing-exact": {"n_sink": 0, "n_recent": 0, "n_exact": 0},
        "of-all-tokens": keep(1.0),
        "of-a-growing-window": {"recent_share": 0.4, "bits": (3, 4)},
        "many-left": {"chunk_size": 64, "n_recent": 30},
        "just-left": {"n_recent": 10, "pieces": (13 + 96 + 31, 1, 31)},
        "many-sinks": {"n_sink": 70},
        "scale": {"scale": 0.7, "bits": 2},
    }
    for name, changed in changes.items():
        yield Case(operation, f"exact-{name}", arrays, {**plan, "pieces": (100, 90), **changed})
    layer = attention_arrays("smooth", (2, *lead), 2, 190, 8, "f32", seed + 4)  # batch rows and heads
    yield Case(operation, "exact-and-shared", layer, {**plan, "method": method, "bits": (4, 2), "pieces": (189, 1)})
    arrays = attention_arrays("normal", lead, 1, 190, 8, "f16", seed + 5)
    ends = np.clip(arrays["keys"].astype(np.float32) * 4e4, -65504, 65504).astype(np.float16)
    largest = {**arrays, "keys": ends, "query": arrays["query"] * np.float16(2.0**-12)}
    yield Case(operation, "exact-largest-f16", largest, {**plan, "bits": 3, "pieces": (190,)})


def refused_exact(operation: str, rules: dict[str, Any]) -> Iterator[Case]:
    """The tokens that are appended have one head."""
    plan = {**rules, **RECENT_TOO, "pieces": (8,)}
    for name, n_exact in {"negative": -1, "float": 10.0, "bool": True, "text": "10", "above-recent": 46}.items():
        yield Case(operation, f"refused-exact-{name}", good_tokens(), {**plan, "n_exact": n_exact}, is_refused=True)
    for name, changed in {"and-16-bits": {"bits": 16}, "and-chunk": {"chunk_size": 48}}.items():
        yield Case(operation, f"refused-exact-{name}", good_tokens(), {**plan, **changed}, is_refused=True)


class FromExactTokens(reference.ClusteredCache):
    """Exact tokens are kept apart until they are clustered, which no small cache can."""

    def append(self, keys: np.ndarray, values: np.ndarray, queries: np.ndarray | None = None) -> Any:
        kept = getattr(self, "kept", (keys[..., :0, :], values[..., :0, :]))
        self.kept = tuple(np.concatenate(pair, axis=-2) for pair in zip(kept, (keys, values), strict=True))
        self.n_before = self._n_recent_quantized
        return super().append(keys, values)

    def n_read_back(self, n: int) -> int:
        """How many of `n` tokens are clustered as they are read back."""
        return 0

    def _quantize_recent(self, start: int, leaving: int) -> None:
        super()._quantize_recent(start, leaving)
        if self.n_exact is None or self.keys is None or self.values is None:
            return
        first, n_read = self.n_sink + self.n_clustered, self.n_read_back(leaving)
        for array, tokens in zip((self.keys, self.values), self.kept, strict=True):
            array[..., start + n_read : start + leaving, :] = tokens[..., first + n_read : first + leaving, :]


class FromWhatIsThere(FromExactTokens):
    def n_read_back(self, n: int) -> int:
        return min(n, self.n_before)


class RecentFirst(reference.ClusteredCache):
    def entries(self) -> tuple[Any, Any, Any]:
        found = super().entries()
        if self.quantized is None:
            return found
        start, n = self.n_sink, self.n_quantized
        order = np.r_[:start, start + n - self._n_recent_quantized : start + n]
        order = np.r_[order, start : start + n - self._n_recent_quantized, start + n : self.n_stored]
        keys, values, counts = (x for x in found if x is not None)
        return keys[..., order, :], values[..., order, :], counts[..., order]


def mistakes_of_exact(replaced: Replace) -> tuple[Mistake, ...]:
    """Which recent tokens are quantized, and what a chunk of them is clustered as."""
    of_rules = {
        "a chunk is clustered from exact tokens: as they are read back": FromExactTokens,
        "tokens that leave at once are clustered exact: as they are read back": FromWhatIsThere,
        "recent tokens come before the body: behind its quantized entries": RecentFirst,
    }
    return (
        Mistake("n_exact is ignored: older recent tokens are quantized", "19.11", change=without("n_exact")),
        Mistake("n_exact is one token fewer: as many as it says", "19.11", change=one_fewer_exact),
        *(Mistake(cause, "19.11", replaced(wrong)) for cause, wrong in of_rules.items()),
    )


def one_fewer_exact(case: Case) -> Case:
    n_exact = case.parameters.get("n_exact")
    return given(n_exact=n_exact - 1)(case) if n_exact else case
