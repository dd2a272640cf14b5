"""`RaggedCache`: heads of a layer with shares of their own."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from kvcluster import reference
from kvcluster.reference.chunks import entries_of_chunk
from kvcluster.reference.merging import Clustering
from kvcluster.reference.ragged_cache import rectangle as right_rectangle

from ..bits import bits_cases, mistakes_of_bits, refused_bits
from ..caches import attended, beside, cache_spelling, fill, good_tokens, numbers_of, refused_tokens, small_tokens
from ..case import Case
from ..changes import given
from ..drawing import Drawing
from ..inputs import DTYPES, KINDS, attention_arrays
from ..mistake import Mistake, Patch
from ..operation import Operation
from ..port import THE_REFERENCE, Port
from ..recent import mistakes_of_chunks, mistakes_of_shares, recent_share_cases, refused_shares
from ..recent_tokens import mistakes_of_exact, recent_cases, refused_exact
from ..whole_heads import mistakes_of_places, returned_counts
from .attention import HEADS, WEIGHTS
from .chunked_soft_matching import MATCHING, joined
from .distinctive_matching import DISTINCTIVE, IGNORED, Distinctive, given_to
from .quantize import QUANTIZING

__all__ = ["OPERATION"]

PLAN: dict[str, Any] = {"chunk_size": 10, "n_sink": 3, "n_recent": 9}
Entries = tuple[np.ndarray, np.ndarray, np.ndarray]  # keys, values, counts


def cases(base: int) -> Iterator[Case]:
    kinds = [kind for kind in KINDS if kind != "huge"]  # whose attention has no bound
    of_heads: tuple[tuple[float, ...], ...] = ((0.3, 1.0, 0.3, 0.55), (1.0, 0.1), (0.7, 0.25, 0.5))
    splits = (("prompt", (80,)), ("split", (0, 1, 2, 57, 20)), ("tokens", (50, *[1] * 30)))
    for index, (dtype, kind) in enumerate((d, k) for d in DTYPES for k in kinds):
        ratios, (name, pieces) = of_heads[index % 3], splits[index // 3 % 3]
        lead = ((2,), (), (1, 2))[index // len(kinds)]  # before the heads
        arrays = attention_arrays(kind, (*lead, len(ratios)), 1 + index % 3, 80, 8, dtype, base + 300 + index)
        changed = {**PLAN, "keep_ratios": ratios, "pieces": pieces}
        yield Case("RaggedCache", f"{kind}-H{len(ratios)}-{name}-{dtype}", arrays, changed)
    for index, (dtype, kind) in enumerate((d, k) for d in DTYPES for k in ("smooth", "signs", "normal")):
        arrays = attention_arrays(kind, (2, 4), 2, 80, 8, dtype, base + 330 + index)
        changed = {**PLAN, "keep_ratios": (0.4, 1.0, 0.8, 0.4), "method": Distinctive(n_shared=2)}
        pieces = splits[(index + index // 3) % 3][1]
        yield Case("RaggedCache", f"{kind}-shared2-{dtype}", arrays, {**changed, "pieces": pieces})
    arrays = attention_arrays("normal", (1, 3), 2, 120, 8, "f32", base + 340)
    changes: dict[str, dict[str, Any]] = {
        "all-whole": {"keep_ratios": (1.0, 1.0, 1.0)},
        "all-alike": {"keep_ratios": (0.3, 0.3, 0.3)},
        "alike-in-entries": {"keep_ratios": (0.31, 0.4, 0.35)},
        "whole-by-rounding": {"keep_ratios": (0.91, 0.9, 1)},
        "product-rounded-up": {"keep_ratios": (0.28, 1.0, 0.29), "chunk_size": 25},
        "three-rounds": {"keep_ratios": (0.2, 0.6, 0.08), "chunk_size": 13},
        "chunks-of-one": {"keep_ratios": (0.2, 1.0, 0.5), "chunk_size": 1},
        "no-sink": {"n_sink": 0},
        "no-recent": {"n_recent": 0},
        "just-due": {"pieces": (3 + 9 + 30, 9, 1)},
        "shared-in-half": {"method": Distinctive(n_shared=40), "keep_ratios": (0.6, 0.9, 0.3)},
        "shared-and-recent": {"method": Distinctive(n_shared=1), "recent_share": 0.3},
        "scale": {"scale": 0.7},
    }
    for name, changed in changes.items():
        rules = {**PLAN, "keep_ratios": (0.5, 1.0, 0.2), "pieces": (70, 50)}
        yield Case("RaggedCache", name, arrays, {**rules, **changed})
    narrow = {**arrays, "values": arrays["values"][..., :5]}
    yield Case("RaggedCache", "narrow-values", narrow, {**PLAN, "keep_ratios": (0.5, 1.0, 0.2), "pieces": (70, 50)})
    alone = attention_arrays("normal", (2, 1), 2, 60, 8, "f32", base + 341)
    yield Case("RaggedCache", "one-head", alone, {**PLAN, "keep_ratios": (0.4,), "pieces": (50, 10)})
    short = attention_arrays("normal", (1, 2), 1, 5, 8, "f32", base + 342)
    yield Case("RaggedCache", "short", short, {**PLAN, "n_sink": 9, "keep_ratios": (0.5, 1.0), "pieces": (2, 3)})
    long = attention_arrays("normal", (2,), 2, 700, 8, "f32", base + 343)
    yield Case("RaggedCache", "defaults", long, {"keep_ratios": (0.25, 0.5), "pieces": (690, 10)})
    yield from recent_share_cases("RaggedCache", {**PLAN, "n_recent": 6, "keep_ratios": (0.4, 1.0)}, (2, 2), base + 350)
    keep, method = lambda share: {"keep_ratios": (share, 1.0, share / 3)}, Distinctive(n_shared=2)
    for of_bits, seed in ((bits_cases, 385), (recent_cases, 450)):
        yield from of_bits("RaggedCache", keep, (3,), method, base + seed)


def refused() -> Iterator[Case]:
    rule = {"keep_ratios": (0.5,), "chunk_size": 2, "n_sink": 1, "n_recent": 2}
    yield from refused_tokens("RaggedCache", rule, {**rule, "keep_ratios": (2.0,)})
    yield from (*refused_shares("RaggedCache", rule), *refused_bits("RaggedCache", rule))
    yield from refused_exact("RaggedCache", rule)
    for name, ratios in (("none", ()), ("number", 0.5), ("bool", (True,)), ("zero", (0.0,)), ("two", (0.5, 0.5))):
        wrong = {**rule, "keep_ratios": ratios, "pieces": (8,)}
        yield Case("RaggedCache", f"refused-{name}", good_tokens(), wrong, is_refused=True)
    for name, value in {"chunk_size": 0, "n_sink": -1, "n_recent": -1, "method": Distinctive(n_shared=0)}.items():
        yield Case("RaggedCache", f"refused-{name}", good_tokens(), {**rule, name: value, "pieces": (8,)}, True)
    one_axis_less = {name: array[0] for name, array in good_tokens().items()}
    yield Case("RaggedCache", "refused-without-heads", one_axis_less, {**rule, "pieces": (8,)}, is_refused=True)


def small(draw: Drawing) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    draw.heads = draw.integer(1, 2)
    arrays, parameters = small_tokens(draw)
    sizes = {"chunk_size": draw.integer(1, 4), "n_sink": draw.integer(0, 2), "n_recent": draw.integer(0, 3)}
    options: tuple[dict[str, Any], ...] = ({}, {"method": Distinctive(1)}, {"recent_share": 0.4})
    ratios = tuple(draw.ratio() for _ in range(draw.heads))
    return arrays, {**parameters, "keep_ratios": ratios, **sizes, **draw.one_of(options)}


def filled_cache(port: Port, case: Case) -> tuple[Any, Any]:
    """The cache of a case, and what its last append returned."""
    cache, parameters = cache_spelling(port, case)
    if "method" in parameters:
        parameters["method"] = given_to(port, parameters["method"])
    filled = cache(**parameters)
    return filled, fill(port, filled, case)


def call(operation: Operation, port: Port, case: Case) -> dict[str, np.ndarray]:
    """Of keys and values in one rectangle only what entries have: zeros where the count is 0."""
    cache, returned = filled_cache(port, case)
    results = numbers_of(port, cache, ("n_seen", "lengths"))
    if hasattr(cache, "entries"):
        keys, values, counts = (port.to_numpy(array) for array in cache.entries())
        keys, values = (np.where(counts[..., None] > 0, array, np.zeros_like(array)) for array in (keys, values))
        results |= {"counts": counts, "keys": keys, "values": values}
    return results | returned_counts(port, returned) | attended(port, cache, case) | beside(port, cache, returned)


def oracle(case: Case) -> tuple[Any, ...]:
    return case.arrays["query"], *filled_cache(THE_REFERENCE, case)[0].entries(), case.parameters.get("scale")


def decisions(case: Case) -> Iterator[str]:
    cache = filled_cache(THE_REFERENCE, case)[0]
    first = cache.caches[cache.keep_ratios[0]]
    size, n_chunks = first.chunk_size, first.n_clustered // first.chunk_size
    yield f"{cache.n_seen} tokens are seen: {n_chunks} chunks of {size} are clustered, in all heads"
    for head, (ratio, n) in enumerate(zip(cache.keep_ratios, cache.lengths, strict=True)):
        yield f"head {head}: a chunk becomes {entries_of_chunk(ratio, size)} entries; {n} entries in all"


def pattern(kinds: set[str], results: set[str]) -> tuple[str, str] | None:
    if results == {"returned_counts"}:
        return "append returns the entries after its clustering: it returns those before, the new tokens last", "18.3"
    if results == {"output"}:
        return "entries are right, attention is not: each head attends to its own keys, values and counts", "18.3"
    return None


def ratios_by(change: Callable[[tuple[float, ...]], Sequence[float]]) -> Callable[[Case], Case]:
    """The same case with other ratios, a function of the right ones."""
    return lambda case: given(keep_ratios=tuple(change(case.parameters["keep_ratios"])))(case)


class OfSome(reference.RaggedCache):
    """The right cache, in which each ratio could be given some heads alone; a mistake is a subclass with others."""

    def seen(self, ratio: float) -> list[int]:
        """The heads whose tokens are clustered with this ratio."""
        return [*range(len(self.keep_ratios))]

    def append(self, keys: np.ndarray, values: np.ndarray, queries: np.ndarray | None = None) -> Entries:
        parts = ((ratio, self.seen(ratio)) for ratio in self.caches)
        made = {r: self.caches[r].append(keys[..., heads, :, :], values[..., heads, :, :]) for r, heads in parts}
        return right_rectangle(self._heads_of(made))

    def _heads_of(self, entries: dict[float, Entries]) -> list[Entries]:
        made = []
        for head, ratio in enumerate(self.keep_ratios):
            at, (keys, values, counts) = self.seen(ratio).index(head), entries[ratio]
            made.append((keys[..., at, :, :], values[..., at, :, :], counts[..., at, :]))
        return made


class OfOneRatio(OfSome):
    def seen(self, ratio: float) -> list[int]:
        return [head for head, other in enumerate(self.keep_ratios) if other == ratio]


class WithoutWhole(OfSome):
    def seen(self, ratio: float) -> list[int]:
        return [head for head, other in enumerate(self.keep_ratios) if ratio == 1 or other < 1]


class ByRatio(reference.RaggedCache):
    """Heads of one ratio lie together in what is returned, held and attended to."""

    def _heads_of(self, entries: dict[float, Entries]) -> list[Entries]:
        heads = super()._heads_of(entries)
        return [heads[head] for ratio in self.caches for head, own in enumerate(self.keep_ratios) if own == ratio]


class Padded(reference.RaggedCache):
    @property
    def lengths(self) -> tuple[int, ...]:
        return (max(super().lengths),) * len(self.keep_ratios)


class RoundedOnce(reference.ClusteredCache):
    """The entries of n chunks are ceil(n * keep_ratio * chunk_size)."""

    def _cluster_what_is_due(self) -> None:
        decided_by, self.method = self.method, self
        self.decided_by = decided_by
        super()._cluster_what_is_due()
        self.method = decided_by

    def cluster(self, keys: np.ndarray, values: np.ndarray, *, keep_ratio: float, chunk_size: int) -> Clustering:
        n_before, n_chunks = self.n_clustered // chunk_size, keys.shape[-2] // chunk_size
        ends = [math.ceil(n * keep_ratio * chunk_size) for n in range(n_before, n_before + n_chunks + 1)]
        made = []
        for chunk, target in enumerate(np.diff(ends)):
            span = slice(chunk * chunk_size, (chunk + 1) * chunk_size)
            ratio = max(0.5, target - 0.5) / chunk_size  # of which the product is rounded up to the target
            arrays = keys[..., span, :], values[..., span, :]
            made.append(self.decided_by.cluster(*arrays, keep_ratio=ratio, chunk_size=chunk_size))
        return joined(made)


def counts_of_the_first(query: np.ndarray, keys: np.ndarray, values: np.ndarray, counts: Any, **scale: Any) -> Any:
    """Attention of all heads with the counts of the first head, as far as it has that many entries."""
    of_first = np.where(counts > 0, np.maximum(counts[..., :1, :], 1), 0)
    return reference.clustered_attention(query, keys, values, of_first, **scale)


def replaced(wrong: type) -> tuple[Patch, ...]:
    return (("ragged_cache", "ClusteredCache", wrong),)


RATIOS = (
    Mistake(
        "all heads have the ratio of the first: each has its own",
        "18.2",
        change=ratios_by(lambda ratios: ratios[:1] * len(ratios)),
    ),
    Mistake(
        "all heads have the mean of the ratios: each has its own",
        "18.2",
        change=ratios_by(lambda ratios: [sum(ratios) / len(ratios)] * len(ratios)),
    ),
    Mistake(
        "all heads have the largest ratio: each has its own",
        "18.2",
        change=ratios_by(lambda ratios: [max(ratios)] * len(ratios)),
    ),
    Mistake("keep_ratios are sorted: each is of the head at its place", "18.2", change=ratios_by(sorted)),
    Mistake(
        "keep_ratios are read from the last to the first: each is of the head at its place",
        "18.2",
        change=ratios_by(lambda ratios: ratios[::-1]),
    ),
    Mistake(
        "the entries of a head are rounded up once for all its chunks: for each chunk", "5.1", replaced(RoundedOnce)
    ),
)
OF_OTHERS = (
    Mistake(
        "heads are clustered with those of their ratio alone: the method sees all heads of the layer",
        "18.2",
        (("", "RaggedCache", OfOneRatio),),
    ),
    Mistake(
        "heads of ratio 1 have no say: the method sees all heads of the layer",
        "18.2",
        (("", "RaggedCache", WithoutWhole),),
    ),
)
LENGTHS = (
    Mistake(
        "heads of one ratio lie together: heads stand where the tokens' heads stood",
        "18.3",
        (("", "RaggedCache", ByRatio),),
    ),
    Mistake("lengths are that of the longest head: no head is padded", "18.3", (("", "RaggedCache", Padded),)),
    Mistake(
        "the counts of the first head are used for all: each head has its own log counts",
        "18.3",
        (("ragged_cache", "clustered_attention", counts_of_the_first),),
    ),
)
PLACES = mistakes_of_places("ragged_cache", "rectangle", right_rectangle, "18.3")
SHARES, BITS = mistakes_of_shares(replaced), (*mistakes_of_bits(replaced), *mistakes_of_exact(replaced), *QUANTIZING)
OF_CLUSTERED = (*MATCHING, *WEIGHTS, *HEADS, *mistakes_of_chunks(replaced), *DISTINCTIVE, *IGNORED)
OPERATION = Operation(
    name="RaggedCache",
    section=18,
    options=("method", "recent_share", "bits", "n_exact"),
    cases=cases,
    refused=refused,
    small=small,
    spelling=cache_spelling,
    call=call,
    oracle=oracle,
    decisions=decisions,
    pattern=pattern,
    mistakes=(*OF_CLUSTERED, *RATIOS, *OF_OTHERS, *LENGTHS, *PLACES, *SHARES, *BITS),
    scaffold="""
# append(keys, values), attend(query), n_seen, lengths, and entries() if you have it
# RaggedCache = my_package.RaggedCache  # keep_ratios, chunk_size, n_sink, n_recent, recent_share, method, bits, n_exact
""",
)
