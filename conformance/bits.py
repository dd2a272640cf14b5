"""Entries in few bits, which more than one cache has: cases, refusals, and what goes wrong with them."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from kvcluster import reference
from kvcluster.reference.chunks import entries_of_chunk
from kvcluster.reference.quantization import GROUP, dequantize, quantize

from .caches import good_tokens
from .case import Case
from .changes import given, without
from .inputs import DTYPES, attention_arrays
from .mistake import Mistake, Patch
from .port import Port

__all__ = [
    "ByBlocks",
    "all_entries",
    "bits_cases",
    "mistakes_of_bits",
    "refused_bits",
    "with_any_group",
]

Keep = Callable[[float], dict[str, Any]]  # the parameters of a cache of which a head keeps this share
Replace = Callable[[type], tuple[Patch, ...]]  # how a wrong `ClusteredCache` takes the place of the right one
PLAN: dict[str, Any] = {"chunk_size": 16, "n_sink": 3, "n_recent": 20}


def bits_cases(operation: str, keep: Keep, lead: tuple[int, ...], method: Any, seed: int) -> Iterator[Case]:
    """Bodies of some blocks of 32 entries, with heads `lead`; once by another method. Fourteen seeds are used."""
    of_both = (4, (8, 4), 2, 3, (2, 8), 8, (4, 3), (3, 2), (8, 8))
    splits = ((150,), (0, 1, 99, 30, 20), (90, *[1] * 60))
    for index, (dtype, kind) in enumerate((d, k) for d in DTYPES for k in ("smooth", "signs", "normal")):
        arrays = attention_arrays(kind, lead, 2, 150, (16, 32, 40)[(index + index // 3) % 3], dtype, seed + index)
        bits, pieces = of_both[index], splits[(index + index // 3) % 3]
        name = f"{kind}-bits{'-'.join(map(str, np.ravel(bits)))}-{dtype}"
        yield Case(operation, name, arrays, {**PLAN, **keep(0.6), "bits": bits, "pieces": pieces})
    arrays = attention_arrays("normal", lead, 2, 150, 16, "f32", seed + 9)
    changes: dict[str, dict[str, Any]] = {
        "of-16": {"bits": 16},
        "of-no-block": {"n_recent": 110},
        "of-whole-blocks": {**keep(0.5), "n_sink": 2, "pieces": (2 + 20 + 63, 1, 63, 1)},
        "of-all-tokens": keep(1.0),
        "nothing-exact": {"n_sink": 0, "n_recent": 0},
        "of-a-growing-window": {"recent_share": 0.3, "bits": (3, 4)},
        "many-sinks": {"n_sink": 40},
        "large-chunks": {"chunk_size": 45, **keep(0.8), "pieces": (150,)},
        "scale": {"scale": 0.7, "bits": 2},
    }
    for name, changed in changes.items():
        parameters = {**PLAN, **keep(0.6), "bits": 4, "pieces": (100, 50), **changed}
        yield Case(operation, f"bits-{name}", arrays, parameters)
    narrow = {**arrays, "values": arrays["values"][..., :5]}
    yield Case(operation, "bits-narrow-values", narrow, {**PLAN, **keep(0.6), "bits": (2, 4), "pieces": (150,)})
    halves = (np.add.outer(np.arange(150), np.arange(16)) % 16 + 0.5).astype(np.float32)  # steps of 1 in 4 bits
    ties = {**arrays, **dict.fromkeys(("keys", "values"), np.broadcast_to(halves, arrays["keys"].shape))}
    yield Case(operation, "bits-ties", ties, {**PLAN, **keep(1.0), "bits": 4, "pieces": (150,)})
    layer = attention_arrays("smooth", (2, *lead), 2, 150, 8, "f32", seed + 13)  # batch rows and heads
    changed = {**keep(0.7), "method": method, "bits": (4, 2), "pieces": (149, 1)}
    yield Case(operation, "bits-and-shared", layer, {**PLAN, **changed})
    for index, kind in enumerate(("zeros", "tiny")):
        arrays = attention_arrays(kind, lead, 2, 150, 8, "f32", seed + 10 + index)
        yield Case(operation, f"{kind}-bits", arrays, {**PLAN, **keep(0.6), "bits": 3, "pieces": (150,)})
    long = attention_arrays("normal", lead, 1, 330, 4, "f32", seed + 12)
    equal = {**long, "keys": np.ones_like(long["keys"])}  # most tokens of a chunk share an entry
    changed = {"chunk_size": 300, **keep(0.11), "bits": 8, "pieces": (330,)}
    yield Case(operation, "bits-large-counts", equal, {**PLAN, **changed})


def refused_bits(operation: str, rules: dict[str, Any]) -> Iterator[Case]:
    """The tokens that are appended have one head."""
    wrong: dict[str, Any] = {"5": 5, "32": 32, "0": 0, "float": 4.0, "bool": True, "text": "4", "none": None}
    wrong |= {"one": (4,), "three": (4, 4, 4), "keys-alone": (4, 16), "pair-of-5": (4, 5), "pair-float": (4.0, 4)}
    for name, bits in wrong.items():
        parameters = {**rules, "bits": bits, "pieces": (8,)}
        yield Case(operation, f"refused-bits-{name}", good_tokens(), parameters, is_refused=True)
    parameters = {**rules, "bits": 8, "pieces": (8,)}
    large_chunk = {**parameters, "chunk_size": 2**15}
    yield Case(operation, "refused-bits-chunk", good_tokens(), large_chunk, is_refused=True)
    for name in ("keys", "values"):
        arrays = good_tokens() | {name: np.full((1, 8, 4), 2e38, np.float32)}
        yield Case(operation, f"refused-bits-large-{name}", arrays, parameters, is_refused=True)


def all_entries(port: Port, cache: Any) -> dict[str, np.ndarray]:
    """All entries in their order, as they are read back, if a cache shows them."""
    if not hasattr(cache, "entries"):
        return {}
    names = ("all_keys", "all_values", "all_counts")
    return {name: port.to_numpy(array) for name, array in zip(names, cache.entries(), strict=True)}


def bits_by(change: Callable[[Any, Any], tuple[int, int]]) -> Callable[[Case], Case]:
    """The same case with other bits, a function of those of keys and of values."""

    def changed(case: Case) -> Case:
        bits = case.parameters.get("bits")
        return given(bits=change(*bits))(case) if isinstance(bits, tuple) else case

    return changed


class ByBlocks(reference.ClusteredCache):
    """The right rule in pieces, for `with_any_group`; a mistake is a subclass with another one."""

    def _quantize_whole_groups(self, start: int, n: int, *, are_recent: bool = False) -> int:
        if are_recent:
            return super()._quantize_whole_groups(start, max(0, n) // GROUP * GROUP, are_recent=True)
        return n if self.bits is None else self.left(start, n)

    def left(self, start: int, n: int) -> int:
        """How many of the `n` entries from `start` on are left once some are quantized."""
        self.quantize(start, n // GROUP * GROUP)
        return n % GROUP

    def quantize(self, start: int, n: int) -> None:
        super()._quantize_whole_groups(start, n)


class ByChunk(ByBlocks):
    def left(self, start: int, n: int) -> int:
        size = entries_of_chunk(self.keep_ratio, self.chunk_size)
        for _ in range(n // size):
            self.quantize(start, size)
        return 0


class ByAppend(ByBlocks):
    def left(self, start: int, n: int) -> int:
        self.quantize(start, n)
        return 0


class In64(ByBlocks):
    def left(self, start: int, n: int) -> int:
        self.quantize(start, n // 64 * 64)
        return n % 64


class RecentToo(ByBlocks):
    def left(self, start: int, n: int) -> int:
        n_recent = self.n_seen - self.n_sink - self.n_clustered
        n_due = (n + n_recent) // GROUP * GROUP
        self.quantize(start, n_due)
        self.n_clustered += max(0, n_due - n)  # tokens that stay what they are
        return max(0, n - n_due)


class SinksToo(ByBlocks):
    def left(self, start: int, n: int) -> int:
        self.quantize(0, (start + n) // GROUP * GROUP)
        return (start + n) % GROUP - start


class CountsInBytes(ByBlocks):
    def left(self, start: int, n: int) -> int:
        n_left = super().left(start, n)
        if self.quantized is not None:
            keys, values, counts = self.quantized
            self.quantized = keys, values, counts % 256
        return n_left


def by_entry(array: np.ndarray, bits: int) -> np.ndarray:
    return dequantize(quantize(array, bits=bits), array.shape[-1])


def by_channel(array: np.ndarray, bits: int) -> np.ndarray:
    return by_entry(array.swapaxes(-1, -2), bits).swapaxes(-1, -2)


def both_by(of_both: Callable[[np.ndarray, int], np.ndarray]) -> tuple[Patch, ...]:
    """Keys and values are quantized in the same way."""

    def read_back(keys: np.ndarray, values: np.ndarray, bits: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, int]:
        return of_both(keys, bits[0]), of_both(values, bits[1]), 0

    return (("quantized_body", "read_back", read_back),)


def with_any_group(patches: tuple[Patch, ...]) -> tuple[Patch, ...]:
    """These, in a reference in which a block may have any size."""
    return (*patches, ("quantized_body", "GROUP", 1))


def mistakes_of_bits(replaced: Replace) -> tuple[Mistake, ...]:
    """Which entries are quantized, when, and with what they share a scale."""
    of_rules = {
        "entries are quantized chunk by chunk: in blocks of 32 entries of the body, of any chunks": ByChunk,
        "all that is clustered after an append is quantized: whole blocks of 32, so that no split matters": ByAppend,
        "entries are quantized 64 at a time: 32": In64,
        "recent tokens are quantized too: entries of the body alone": RecentToo,
        "sinks are quantized too: entries of the body alone": SinksToo,
    }
    return (
        Mistake("bits is ignored: the body is quantized", "19.6", change=without("bits")),
        Mistake("the bits of keys and of values are swapped", "19.6", change=bits_by(lambda k, v: (v, k))),
        Mistake("values have the bits of the keys: their own", "19.6", change=bits_by(lambda k, v: (k, k))),
        Mistake("keys share scales entry by entry: channel by channel, over 32 entries", "19.6", both_by(by_entry)),
        Mistake("values share scales channel by channel: entry by entry", "19.6", both_by(by_channel)),
        Mistake("counts of quantized entries have 8 bits: 16", "19.6", with_any_group(replaced(CountsInBytes))),
        *(Mistake(cause, "19.7", with_any_group(replaced(wrong))) for cause, wrong in of_rules.items()),
    )
