"""Whole heads, which more than one cache has: cases, refusals, and what goes wrong with them."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from kvcluster import reference
from kvcluster.reference.merging import Clustering
from kvcluster.reference.whole_heads import together as right_together

from .caches import good_tokens
from .case import Case
from .changes import given, without
from .inputs import DTYPES, attention_arrays
from .mistake import Mistake

__all__ = [
    "WHOLE_HEADS",
    "OfAllHeads",
    "mistakes_of_places",
    "refused_heads",
    "returned_counts",
    "whole_head_cases",
]

Entries = tuple[np.ndarray, np.ndarray, np.ndarray]  # keys, values, counts


def whole_head_cases(operation: str, rules: dict[str, Any], seed: int) -> Iterator[Case]:
    """Five KV heads of which some stay whole, in caches with these rules; thirteen seeds are used."""
    settings = ((1,), (4, 0), (0, 1, 3))
    for index, (dtype, kind) in enumerate((d, k) for d in DTYPES for k in ("smooth", "signs", "normal")):
        arrays = attention_arrays(kind, (2, 5), 2, 80, 8, dtype, seed + index)
        pieces = ((80,), (50, *[1] * 30), (0, 1, 49, 30))[index // 3]
        heads = settings[index % 3]
        name = f"{kind}-whole{len(heads)}-{dtype}"
        yield Case(operation, name, arrays, {**rules, "whole_heads": heads, "pieces": pieces})
    arrays = attention_arrays("normal", (2, 5), 2, 80, 8, "f32", seed + 10)
    for name, more in (("no-whole", ()), ("all-whole", (0, 1, 2, 3, 4))):
        yield Case(operation, name, arrays, {**rules, "whole_heads": more, "pieces": (60, 20)})
    yield Case(operation, "whole-scale", arrays, {**rules, "whole_heads": (2,), "scale": 0.7, "pieces": (80,)})
    of_one = attention_arrays("smooth", (3,), 2, 80, 8, "f32", seed + 11)
    yield Case(operation, "whole-without-batch", of_one, {**rules, "whole_heads": (1,), "pieces": (60, 20)})
    short = attention_arrays("normal", (1, 2), 1, 5, 8, "f32", seed + 12)
    yield Case(operation, "whole-short", short, {**rules, "whole_heads": (1,), "pieces": (2, 3)})


def refused_heads(operation: str, rules: dict[str, Any]) -> Iterator[Case]:
    """The tokens that are appended have one head."""
    for name, heads in (("twice", (0, 0)), ("negative", (-1,)), ("beyond", (1,)), ("number", 0), ("bool", (False,))):
        parameters = {**rules, "whole_heads": heads, "pieces": (8,)}
        yield Case(operation, f"refused-whole-{name}", good_tokens(), parameters, is_refused=True)


def returned_counts(port: Any, returned: Any) -> dict[str, np.ndarray]:
    """The counts of all heads that an append returned, if it returned keys, values and counts."""
    is_triple = isinstance(returned, tuple) and len(returned) == 3
    return {"returned_counts": port.to_numpy(returned[2])} if is_triple else {}


def the_others(case: Case) -> Case:
    """The heads that are not named stay whole."""
    if "whole_heads" not in case.parameters:
        return case
    heads = case.arrays["keys"].shape[-3]
    return given(whole_heads=tuple(set(range(heads)) - set(case.parameters["whole_heads"])))(case)


def others_first(*arrays: Any) -> Entries:
    """All heads, those that are clustered first."""
    keys, values, counts = right_together(*arrays)
    heads, whole_heads = keys.shape[-3], arrays[-1]
    order = [*(head for head in range(heads) if head not in whole_heads), *whole_heads]
    return keys[..., order, :, :], values[..., order, :, :], counts[..., order, :]


def entries_first(right: Callable[..., Entries]) -> Callable[..., Entries]:
    """`right` with the entries of short heads before the places without any."""

    def wrong(*arrays: Any) -> Entries:
        keys, values, counts = right(*arrays)
        order = np.argsort(counts == 0, axis=-1, kind="stable")
        keys, values = (np.take_along_axis(array, order[..., None], axis=-2) for array in (keys, values))
        return keys, values, np.take_along_axis(counts, order, axis=-1)

    return wrong


def all_attended(right: Callable[..., Entries]) -> Callable[..., Entries]:
    """`right` with a count of 1 where there is no entry."""

    def wrong(*arrays: Any) -> Entries:
        keys, values, counts = right(*arrays)
        return keys, values, np.maximum(counts, 1)

    return wrong


class OfAllHeads(reference.ClusteredCache):
    """What is clustered is decided in all heads, whole ones included; the decisions for the others are kept."""

    def _cluster_what_is_due(self) -> None:
        decided_by, self.method = self.method, self if self.whole_heads else self.method
        self.decided_by = decided_by
        super()._cluster_what_is_due()
        self.method = decided_by

    def cluster(self, keys: np.ndarray, values: np.ndarray, **rules: Any) -> Clustering:
        start = self.n_sink + self.n_clustered
        span = slice(start, start + keys.shape[-2])
        places = np.array(self.whole_heads) - np.arange(len(self.whole_heads))
        pairs = ((keys, self.whole_keys), (values, self.whole_values))
        every = (np.insert(others, places, whole[..., span, :], axis=-3) for others, whole in pairs)
        made = self.decided_by.cluster(*every, **rules)
        return Clustering(*(np.delete(array, self.whole_heads, axis=-2) for array in (made.labels, made.counts)))


def mistakes_of_places(module: str, name: str, right: Callable[..., Entries], rule: str) -> tuple[Mistake, ...]:
    """What goes wrong in the one rectangle of all heads, which `right` makes; its name in a module of the reference."""
    return (
        Mistake(
            "entries come before the places of count 0: after them, so that new tokens are the last of every head",
            rule,
            ((module, name, entries_first(right)),),
        ),
        Mistake(
            "places without an entry are attended to: their count is 0, and they take no part",
            rule,
            ((module, name, all_attended(right)),),
        ),
    )


WHOLE_HEADS = (
    Mistake("whole_heads is ignored: these heads keep every token", "9.13", change=without("whole_heads")),
    Mistake("the heads that are named are clustered: the others are, these stay whole", "9.13", change=the_others),
    Mistake(
        "heads have another order than the tokens' had: whole heads stand where they stood",
        "9.15",
        (("entry_cache", "together", others_first),),
    ),
    *mistakes_of_places("entry_cache", "together", right_together, "9.15"),
)
