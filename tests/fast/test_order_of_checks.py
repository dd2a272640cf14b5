"""Two wrong arguments at once: both packages refuse the same of them, with the same words."""

import itertools

import numpy as np
import pytest
from inputs import make_keys, to_torch

from kvcluster import fast, reference

KEYS = make_keys("normal", (2, 40, 8), np.dtype(np.float32), 0)
QUERIES = KEYS[:, None, :4].repeat(3, axis=1)[:, :2]
COUNTS = np.ones((2, 40), dtype=np.int64)
NO_INTEGERS = ("1", 1.5, -1, True, None, 10**30)
NO_NUMBERS = ("1", 1.5, -1, True, 1j, float("nan"), 10**400)
NO_ARRAYS = (
    None,
    KEYS.astype(np.float64),
    KEYS[0, 0],
    KEYS[..., :0],
    np.full_like(KEYS, np.nan),
    KEYS[:1],
    KEYS[:, :5],
)
SIZES = dict.fromkeys(("chunk_size", "n_sink", "n_recent"), NO_INTEGERS)
CHUNKS = SIZES | {"bits": (5, "4", (4,), (4, 5), True, 4), "n_exact": (*NO_INTEGERS[:4], 3), "recent_share": NO_NUMBERS}
METHODS = {"method": ("soft", type, None, "attended")}
WRONG = {
    "ClusteredCache": CHUNKS | METHODS | {"keep_ratio": NO_NUMBERS, "whole_heads": ("01", 3, (0, 0), (-1,), (1,))},
    "BoundedCache": SIZES | {"keep_ratio": NO_NUMBERS, "budget": (*NO_INTEGERS, 50)},
    "RaggedCache": CHUNKS | METHODS | {"keep_ratios": ("12", 0.5, (), (0.5, "1"), (0.5, 2))},
    "ChelseaCache": SIZES
    | {"ratio": NO_NUMBERS, "whole_heads": ("01", 3, (0, 0)), "interval": NO_INTEGERS}
    | {"max_new_tokens": NO_INTEGERS, "n_prompt": NO_INTEGERS[:4]},
    "RecallCache": dict.fromkeys(("budget", "n_sink", "n_recent", "tokens_per_cluster", "max_iter"), NO_INTEGERS)
    | dict.fromkeys(("segment_size", "prompt_segment_size", "init_seed"), (*NO_INTEGERS[:4], 2**32))
    | {"spread": NO_NUMBERS, "bits": (5, "4", (4,), True)},
    "Distinctive": {"n_shared": NO_INTEGERS},
    "Attended": {"n_shared": NO_INTEGERS, "share": NO_NUMBERS},
    "alternating_partition": {"size": NO_INTEGERS},
    "chunked_soft_matching": {"keys": NO_ARRAYS[:5], "keep_ratio": NO_NUMBERS, "chunk_size": NO_INTEGERS},
    "distinctive_matching": {"keys": NO_ARRAYS, "values": NO_ARRAYS, "keep_ratio": NO_NUMBERS}
    | dict.fromkeys(("chunk_size", "n_shared"), NO_INTEGERS),
    "attended_matching": {"keys": NO_ARRAYS, "queries": NO_ARRAYS, "keep_ratio": NO_NUMBERS, "share": NO_NUMBERS}
    | dict.fromkeys(("chunk_size", "n_shared"), NO_INTEGERS),
    "kmeans": {"keys": NO_ARRAYS[:5], "n_clusters": (*NO_INTEGERS, 41), "max_iter": NO_INTEGERS},
    "attention": {
        "query": NO_ARRAYS,
        "keys": NO_ARRAYS,
        "values": NO_ARRAYS,
        "scale": (*NO_NUMBERS[:1], *NO_NUMBERS[3:]),
    },
    "select_clusters": {"query": NO_ARRAYS, "centroids": NO_ARRAYS, "counts": (None, KEYS[..., 0], -COUNTS, COUNTS[:1])}
    | {"budget": NO_INTEGERS, "spread": NO_NUMBERS, "deviations": NO_ARRAYS[1:]},
    "quantize": {"array": NO_ARRAYS[:5], "bits": NO_INTEGERS},
}
RIGHT = {
    "ClusteredCache": {"keep_ratio": 0.5},
    "BoundedCache": {"keep_ratio": 0.5, "budget": 500},
    "RaggedCache": {"keep_ratios": (0.5, 0.25)},
    "ChelseaCache": {"ratio": 0.5, "max_new_tokens": 3},
    "RecallCache": {"budget": 400},
    "chunked_soft_matching": {"keys": KEYS, "keep_ratio": 0.5, "chunk_size": 10},
    "distinctive_matching": {"keys": KEYS, "values": KEYS, "keep_ratio": 0.5, "chunk_size": 10},
    "attended_matching": {"keys": KEYS, "values": KEYS, "queries": QUERIES, "keep_ratio": 0.5, "chunk_size": 20},
    "kmeans": {"keys": KEYS, "n_clusters": 3},
    "attention": {"query": KEYS[:, :2], "keys": KEYS, "values": KEYS},
    "select_clusters": {"query": KEYS[:, :2], "centroids": KEYS, "counts": COUNTS, "budget": 5},
    "quantize": {"array": KEYS, "bits": 4},
}


def argument(package, name, value):
    if isinstance(value, np.ndarray) and package is fast:
        return to_torch(value)
    return package.Attended() if name == "method" and value == "attended" else value


def refusal(package, function, parameters):
    """Kind and words of what a call is refused with; None if it is not."""
    given = {name: argument(package, name, value) for name, value in parameters.items()}
    try:
        getattr(package, function)(**given)
    except (TypeError, ValueError) as error:
        return type(error).__name__, str(error)
    return None


def pairs(function):
    """Parameters with one or two wrong values."""
    wrong = WRONG[function]
    singles = [{name: value} for name, values in wrong.items() for value in values]
    both = [a | b for a, b in itertools.combinations(singles, 2) if a.keys() != b.keys()]
    return [RIGHT.get(function, {}) | of for of in singles + both]


def differing(function, step=1):
    found = [(refusal(reference, function, of), refusal(fast, function, of)) for of in pairs(function)[::step]]
    words = {"NumPy array": "torch tensor", "ndarray": "Tensor"}
    for old, new in words.items():
        found = [(a and (a[0], a[1].replace(old, new)), b) for a, b in found]
    return [(a, b) for a, b in found if a != b], len(found)


@pytest.mark.parametrize("function", WRONG)
def test_both_packages_refuse_the_same_argument_first(function, record_property):
    different, n_calls = differing(function)
    assert different == []
    record_property("calls", {"refused": n_calls})


def test_wrong_twin_that_checks_in_another_order_is_caught(monkeypatch):
    right = fast.ClusteredCache.__init__

    def recent_first(self, *, n_recent=64, **rules):
        fast.Distinctive(n_shared=1 if isinstance(n_recent, int) and n_recent >= 0 else n_recent)
        right(self, n_recent=n_recent, **rules)

    monkeypatch.setattr(fast.ClusteredCache, "__init__", recent_first)
    assert differing("ClusteredCache")[0]
