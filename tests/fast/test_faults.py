"""A change that fails, wherever it does: the cache is as it was, or as it should be, or refuses everything."""

import copy
from collections import Counter

import numpy as np
import pytest
import torch
from caches import make_tiered
from faults import KINDS, N_PLACES, SilentError, bytes_of, counted, outcome, places
from inputs import make_keys, slowly

from kvcluster import fast
from kvcluster.fast.bounded_cache import BoundedCache
from kvcluster.fast.memory import changes

SIZES = {"chunk_size": 16, "n_sink": 3, "n_recent": 40}
EXACT = {"chunk_size": 32, "n_sink": 3, "n_recent": 70, "bits": 4, "n_exact": 9}
RECALL = {"budget": 40, "n_sink": 3, "tokens_per_cluster": 4, "segment_size": 20, "prompt_segment_size": 40}
MAKERS = {
    "clustered": lambda: fast.ClusteredCache(keep_ratio=0.4, **SIZES),
    "whole heads": lambda: fast.ClusteredCache(keep_ratio=0.4, whole_heads=(1,), **SIZES),
    "bits": lambda: fast.ClusteredCache(keep_ratio=0.4, bits=4, **SIZES),
    "recent in bits": lambda: fast.ClusteredCache(keep_ratio=0.4, **EXACT),
    "attended": lambda: fast.ClusteredCache(keep_ratio=0.4, method=fast.Attended(n_shared=2), **SIZES),
    "budget": lambda: BoundedCache(budget=90, keep_ratio=0.5, **SIZES),
    "ragged": lambda: fast.RaggedCache(keep_ratios=(0.3, 0.7), method=fast.Distinctive(n_shared=2), **SIZES),
    "ragged in bits": lambda: fast.RaggedCache(keep_ratios=(0.3, 0.7), **EXACT),
    "chelsea": lambda: fast.ChelseaCache(ratio=0.5, max_new_tokens=0, interval=4, **SIZES),
    "recall": lambda: fast.RecallCache(**RECALL),
    "recall in bits": lambda: fast.RecallCache(bits=4, centroids_for_rest=True, **RECALL),
    "tiered": lambda: make_tiered(**RECALL),
    "tiered in bits": lambda: make_tiered(bits=4, n_steps=2, **RECALL),
}
QUERY = torch.from_numpy(make_keys("normal", (2, 2, 2, 16), np.dtype(np.float32), 9))


def tokens(n, seed):
    return [torch.from_numpy(make_keys("smooth", (2, 2, n, 16), np.dtype(np.float32), seed + i)) for i in range(2)]


def append(n, seed):
    """Take `n` tokens in one call."""

    def change(cache):
        queries = torch.from_numpy(make_keys("normal", (2, 2, 2, n, 16), np.dtype(np.float32), seed + 2))
        more = (queries,) if getattr(cache, "_queries", None) is not None else ()
        cache.append(*tokens(n, seed), *more)

    return change


def in_halves(n, seed):
    """Take `n` tokens as a model does: first these, then what is due."""

    def change(cache):
        cache.extend(*tokens(n, seed))
        if getattr(cache, "_queries", None) is not None:
            cache.observe(torch.ones(2, 2, 2, n, 16))
        cache.cluster()

    return change


CHANGES = {
    "a token": append(1, 20),
    "a chunk": append(60, 30),
    "crop": lambda cache: cache.crop(min(25, cache.n_croppable)),  # what it has just clustered, too
    "select": lambda cache: cache.select(torch.tensor([1, 0])),
    "attend": lambda cache: cache.attend(QUERY),
}


def signature(cache):
    tensors, numbers = cache.state()
    output = cache.attend(QUERY).numpy().tobytes() if tensors else None
    return bytes_of(tensors), {**numbers, "spans": None}, output, cache.n_croppable, cache.n_stored, cache.nbytes


def follow(cache):
    append(23, 40)(cache)
    cache.crop(2)
    append(50, 50)(cache)


def prepared(kind):
    """A cache with a body, whose last tokens have just made it longer."""
    cache = MAKERS[kind]()
    append(150, 0)(cache)
    append(30, 10)(cache)
    cache.attend(QUERY)
    return cache


def outcomes(kind, change, n_places, start=None):
    """How often each outcome occurs with faults at about `n_places` places, of torch calls and of lines."""
    cache = prepared(kind) if start is None else start
    after, found = copy.deepcopy(cache), Counter()
    change(after)
    for of_fault in KINDS:
        for place in places(counted(of_fault, change, copy.deepcopy(cache)), n_places):
            found[outcome(of_fault, place, cache, change, after, signature, follow)] += 1
    return found


QUICK = ("clustered", "recall in bits")


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("kind", [(slowly, pytest.param)[kind in QUICK](kind) for kind in MAKERS])
def test_no_change_fails_silently(kind, name, record_property):
    found = outcomes(kind, CHANGES[name], N_PLACES)
    assert sum(found.values()) >= 8
    record_property("faults", dict(found))
    if name in ("select", "attend"):
        assert "refused" not in found


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in MAKERS if kind != "attended"])
def test_what_a_file_held_is_taken_over_whole_or_not_at_all(kind, record_property):
    state, empty = prepared(kind).state(), MAKERS[kind]()
    found = outcomes(kind, lambda cache: cache.restore(*state), N_PLACES, empty)
    assert set(found) <= {"before", "after"}
    record_property("faults", dict(found))


@pytest.mark.parametrize("kind", MAKERS)
def test_a_cache_that_has_failed_refuses_everything(kind, monkeypatch):
    cache = prepared(kind)
    monkeypatch.setattr(type(cache), "_cluster", lambda cache: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        append(60, 30)(cache)
    for use in (
        *CHANGES.values(),
        in_halves(1, 0),
        lambda cache: cache.keys,
        lambda cache: cache.n_seen,
        lambda cache: cache.nbytes,
        lambda cache: cache.state(),
        copy.deepcopy,
    ):
        with pytest.raises(RuntimeError, match=r"an earlier append of this .*Cache failed halfway"):
            use(cache)
    with pytest.raises(AttributeError, match="object has no attribute 'unheard_of'"):
        _ = MAKERS[kind]().unheard_of


def test_wrong_twin_that_holds_on_to_what_is_written_over_is_caught(monkeypatch):
    outcomes("clustered", in_halves(60, 30), N_PLACES)
    monkeypatch.setattr(changes, "withhold", lambda cache, name: None)
    with pytest.raises(SilentError):
        outcomes("clustered", in_halves(60, 30), N_PLACES)
