"""`ClusteredCache`, also by another method, and with a budget, which a `BoundedCache` keeps."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np

from kvcluster import reference
from kvcluster.reference.chunks import entries_of_chunk
from kvcluster.reference.merging import Clustering, merge

from ..bits import all_entries, bits_cases, mistakes_of_bits, refused_bits
from ..caches import (
    attended,
    beside,
    cache_spelling,
    fill,
    good_tokens,
    held_by,
    numbers_of,
    refused_tokens,
    small_tokens,
)
from ..case import Case
from ..changes import given, without
from ..drawing import Drawing
from ..inputs import DTYPES, attention_arrays
from ..mistake import Mistake, Patch
from ..operation import Operation, Spelling
from ..port import THE_REFERENCE, Port, parameters_of
from ..recent import mistakes_of_chunks, mistakes_of_shares, recent_share_cases, refused_shares
from ..recent_tokens import mistakes_of_exact, recent_cases, refused_exact
from ..whole_heads import WHOLE_HEADS, OfAllHeads, refused_heads, returned_counts, whole_head_cases
from .attention import HEADS, WEIGHTS
from .chunked_soft_matching import MATCHING
from .distinctive_matching import DISTINCTIVE, IGNORED, Distinctive, given_to
from .quantize import QUANTIZING

__all__ = ["OPERATION"]


def cases(base: int) -> Iterator[Case]:
    plan: dict[str, Any] = {"keep_ratio": 0.25, "chunk_size": 16, "n_sink": 3, "n_recent": 20}
    for index, (dtype, kind) in enumerate((d, k) for d in DTYPES for k in ("smooth", "signs", "normal")):
        arrays = attention_arrays(kind, (2,), 3, 150, 16, dtype, base + 110 + index)
        for name, pieces in (("prompt", (150,)), ("split", (1, 2, 60, 1, 0, 37, 49)), ("tokens", (100, *[1] * 50))):
            yield Case("ClusteredCache", f"{kind}-{name}-{dtype}", arrays, {**plan, "pieces": pieces})
    arrays = attention_arrays("normal", (1, 2), 2, 200, 8, "f32", base + 120)
    changes: dict[str, Any] = {
        "defaults": {"keep_ratio": 0.25, "chunk_size": 64, "n_sink": 4, "n_recent": 64},  # those of 0.2
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
    yield from distinctive_cases(base)
    yield from budget_cases(base)
    plan = {**plan, "keep_ratio": 0.3, "chunk_size": 10, "n_recent": 9, "pieces": (70, 10)}
    yield from whole_head_cases("ClusteredCache", plan, base + 260)
    layer = attention_arrays("smooth", (2, 4), 2, 80, 8, "f32", base + 273)
    for heads in ((2,), (0, 3)):
        changed = {**plan, "method": Distinctive(n_shared=2), "whole_heads": heads}
        yield Case("ClusteredCache", f"shared-whole{len(heads)}", layer, changed)
    long = attention_arrays("normal", (1,), 2, 700, 8, "f32", base + 275)
    yield Case("ClusteredCache", "new-defaults", long, {"keep_ratio": 0.25, "pieces": (690, 10)})
    plan = {**plan, "keep_ratio": 0.4, "n_recent": 6}
    yield from recent_share_cases("ClusteredCache", plan, (2,), base + 280)
    for name, more in (("shared", {"method": Distinctive(n_shared=2)}), ("whole", {"whole_heads": (1,)})):
        yield Case("ClusteredCache", f"recent-and-{name}", layer, {**plan, "recent_share": 0.4, **more})
    method = Distinctive(n_shared=2)
    yield from bits_cases("ClusteredCache", lambda share: {"keep_ratio": share}, (2,), method, base + 370)
    yield from recent_cases("ClusteredCache", lambda share: {"keep_ratio": share}, (2,), method, base + 440)


def distinctive_cases(base: int) -> Iterator[Case]:
    plan = {"keep_ratio": 0.4, "chunk_size": 20, "n_sink": 3, "n_recent": 9, "method": Distinctive(n_shared=3)}
    for index, (dtype, kind) in enumerate((d, k) for d in DTYPES for k in ("smooth", "signs", "normal")):
        arrays = attention_arrays(kind, (2,), 3, 110, 16, dtype, base + 160 + index)
        pieces = ((110,), (1, 2, 60, 0, 47), (70, *[1] * 40))[index % 3]
        yield Case("ClusteredCache", f"{kind}-shared3-{dtype}", arrays, {**plan, "pieces": pieces})
    arrays = attention_arrays("normal", (2, 2), 2, 110, 8, "f32", base + 170)  # batch rows and heads
    yield Case("ClusteredCache", "shared-in-batch-rows", arrays, {**plan, "pieces": (100, 10)})


def budget_cases(base: int) -> Iterator[Case]:
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


def refused() -> Iterator[Case]:
    yield from refused_tokens("ClusteredCache", {"keep_ratio": 0.5}, {"keep_ratio": 2.0})
    rule = {"keep_ratio": 0.5, "chunk_size": 2, "n_sink": 1, "n_recent": 2, "pieces": (8,)}
    wrong: dict[str, dict[str, Any]] = {
        "budget": {"budget": 4},  # one too few
        "shared": {"method": Distinctive(n_shared=0)},
        "budget-and-shared": {"budget": 20, "method": Distinctive(n_shared=1)},
    }
    for name, limits in wrong.items():
        yield Case("ClusteredCache", f"refused-{name}", good_tokens(), {**rule, **limits}, is_refused=True)
    yield from refused_heads("ClusteredCache", {"keep_ratio": 0.5, "chunk_size": 2, "n_sink": 1, "n_recent": 2})
    rule = {"keep_ratio": 0.5, "chunk_size": 2, "n_sink": 1, "n_recent": 2}
    yield from refused_shares("ClusteredCache", rule)
    yield from refused_bits("ClusteredCache", rule)
    yield from refused_exact("ClusteredCache", rule)
    whole = {**rule, "whole_heads": (0,), "bits": 8, "pieces": (8,)}
    yield Case("ClusteredCache", "refused-bits-whole", good_tokens(), whole, is_refused=True)


def small(draw: Drawing) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    draw.heads = draw.integer(1, 2)
    arrays, parameters = small_tokens(draw)
    sizes = {"chunk_size": draw.integer(1, 4), "n_sink": draw.integer(0, 2), "n_recent": draw.integer(0, 3)}
    keep_ratio = draw.ratio()
    least = sum(sizes.values()) - 1 + entries_of_chunk(keep_ratio, sizes["chunk_size"])
    options: tuple[dict[str, Any], ...] = ({}, {"method": Distinctive(1)}, {"budget": least}, {"budget": least + 1})
    options = (*options, {"whole_heads": (draw.heads - 1,)}, {"recent_share": 0.4})
    return arrays, {**parameters, "keep_ratio": keep_ratio, **sizes, **draw.one_of(options)}


def spelling(port: Port, case: Case) -> Spelling:
    """As version 0.2 spells it, `method=` and a `BoundedCache`, or as 0.1 did: `n_shared=` and `budget=`."""
    cache, parameters = cache_spelling(port, case)
    has_bounded = "budget" in parameters and hasattr(port.namespace, "BoundedCache")
    if has_bounded:
        cache = port.namespace.BoundedCache
    if "method" in parameters:
        known, takes_others = parameters_of(cache)
        method = parameters["method"]
        has_method = "method" in known or (takes_others and hasattr(port.namespace, type(method).__name__))
        if has_bounded and not has_method:  # it can only refuse, and must
            return (lambda **options: port.namespace.BoundedCache(**options)), parameters
        if not has_method:
            del parameters["method"]
            parameters |= asdict(method)
    return cache, parameters


def new_cache(port: Port, case: Case) -> Any:
    cache, parameters = spelling(port, case)
    if "method" in parameters:
        parameters["method"] = given_to(port, parameters["method"])
    return cache(**parameters)


def call(operation: Operation, port: Port, case: Case) -> dict[str, np.ndarray]:
    cache = new_cache(port, case)
    returned = fill(port, cache, case)
    results = numbers_of(port, cache, ("n_seen", "n_stored"))
    if isinstance(returned, tuple) and len(returned) == 3:  # the entries before the last clustering
        results["n_returned"] = np.array(port.to_numpy(returned[2]).shape[-1])
    if "whole_heads" in case.parameters:  # then they are those of one rectangle
        results |= returned_counts(port, returned)
    results |= held_by(port, cache, ("keys", "values", "counts", "whole_keys", "whole_values"))
    if "bits" in case.parameters:  # these are then the entries that are not quantized
        results |= all_entries(port, cache)
    return results | attended(port, cache, case) | beside(port, cache, returned)


def oracle(case: Case) -> tuple[Any, ...]:
    cache = new_cache(THE_REFERENCE, case)
    fill(THE_REFERENCE, cache, case)
    return case.arrays["query"], *cache.entries(), case.parameters.get("scale")


def pattern(kinds: set[str], results: set[str]) -> tuple[str, str] | None:
    if results == {"n_returned"}:
        return "append returns the entries after its clustering: it returns those before, the new tokens last", "9.7"
    return None


def budget_beside_sinks(case: Case) -> Case:
    budget = case.parameters.get("budget")
    return case if budget is None else given(budget=budget + case.parameters.get("n_sink", 16))(case)


class BudgetAtTheEnd(reference.BoundedCache):
    """Spans are merged when an append is done, not after each of its tokens."""

    def append(self, keys: np.ndarray, values: np.ndarray, queries: np.ndarray | None = None) -> Any:
        return reference.ClusteredCache.append(self, keys, values)


def replaced_caches(wrong: type) -> tuple[Patch, ...]:
    """A wrong cache, without and with a budget."""
    bounded = type(wrong.__name__, (wrong, reference.BoundedCache), {})
    return ("", "ClusteredCache", wrong), ("", "BoundedCache", bounded)


def merge_the_last_of_equal_pairs(spans: list[int]) -> int:
    together = [spans[place] + spans[place + 1] for place in range(len(spans) - 1)]
    return len(together) - 1 - together[::-1].index(min(together))


def unweighted_mean(array: np.ndarray, counts: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return merge(array, Clustering(labels, np.bincount(labels)))


OPTIONS = (
    Mistake("budget is ignored: spans are merged until it is kept", "9.11", change=without("budget")),
    Mistake(
        "sinks are not counted: budget is all stored entries, sinks and recent included",
        "9.11",
        change=budget_beside_sinks,
    ),
    Mistake(
        "the budget is kept after an append only: after each of its tokens",
        "9.11",
        (("", "BoundedCache", BudgetAtTheEnd),),
    ),
    Mistake(
        "of equal pairs of spans the youngest is merged: the oldest",
        "9.11",
        (("bounded_cache", "smallest_pair", merge_the_last_of_equal_pairs),),
    ),
    Mistake(
        "the oldest pair of spans is merged: the pair of the fewest tokens",
        "9.11",
        (("bounded_cache", "smallest_pair", lambda spans: 0),),
    ),
    Mistake(
        "entries of merged spans weigh the same: each weighs by its count",
        "9.12",
        (("span_merging", "weighted_mean", unweighted_mean),),
    ),
)
OF_OTHERS = (
    Mistake(
        "whole heads have a say in what stays exact: the method sees the other heads alone",
        "9.13",
        (("", "ClusteredCache", OfAllHeads),),
    ),
)
BEFORE_OPTIONS = (*MATCHING, *WEIGHTS, *HEADS, *mistakes_of_chunks(replaced_caches))
SHARES = mistakes_of_shares(replaced_caches)
BITS = (*mistakes_of_bits(replaced_caches), *mistakes_of_exact(replaced_caches), *QUANTIZING)
OPERATION = Operation(
    name="ClusteredCache",
    section=9,
    options=("budget", "method", "whole_heads", "recent_share", "bits", "n_exact"),
    cases=cases,
    refused=refused,
    small=small,
    spelling=spelling,
    call=call,
    oracle=oracle,
    pattern=pattern,
    mistakes=(*BEFORE_OPTIONS, *DISTINCTIVE, *IGNORED, *OPTIONS, *WHOLE_HEADS, *OF_OTHERS, *SHARES, *BITS),
    scaffold="""
# append(keys, values), attend(query), n_seen, n_stored; keep what you have of the last two
# ClusteredCache = my_package.ClusteredCache
# keep_ratio, chunk_size, n_sink, n_recent, recent_share, method, bits, n_exact
# Distinctive = my_package.Distinctive  # n_shared
# BoundedCache = my_package.BoundedCache  # budget, keep_ratio, chunk_size, n_sink, n_recent
""",
)
