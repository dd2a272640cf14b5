"""A call of a model that fails, wherever it does: its cache is as it was, or as it should be, or refuses the next."""

import copy
from collections import Counter

import pytest
import torch
from faults import KINDS, N_PLACES, SilentError, bytes_of, counted, outcome, places
from inputs import slowly
from models import random_tokens, tiny_llama

from kvcluster.fast import Attended, SoftMatching
from kvcluster.fast.huggingface import ChelseaCache, ClusteredCache, RecallCache
from kvcluster.fast.huggingface.model_cache import ModelCache

SIZES = {"chunk_size": 16, "n_sink": 3, "n_recent": 40}
PADDED = torch.arange(80) >= torch.tensor([0, 5])[:, None]
MAKERS = {
    "clustered": lambda model: ClusteredCache.for_model(model, keep_ratio=0.4, method=SoftMatching(), **SIZES),
    "attended": lambda model: ClusteredCache.for_model(model, keep_ratio=0.4, method=Attended(n_shared=2), **SIZES),
    "bits": lambda model: ClusteredCache.for_model(model, keep_ratio=0.4, bits=4, **SIZES),
    "chelsea": lambda model: ChelseaCache.for_model(model, ratio=0.5, max_new_tokens=0, whole_heads=(), interval=4),
    "recall": lambda model: RecallCache.for_model(model, budget=30, n_sink=3, segment_size=20, tokens_per_cluster=4),
    "offloaded": lambda model: RecallCache.for_model(model, budget=30, n_sink=3, segment_size=20, offloading=True),
}


@pytest.fixture(scope="module")
def model():
    return tiny_llama(layers=2)


def call(model, n, *, mask=None):
    tokens = random_tokens(n, batch=2)

    def change(cache):
        with torch.no_grad():
            model(tokens, past_key_values=cache, attention_mask=None if mask is None else mask[:, : cache.n_seen + n])

    return change


def changes(model, mask):
    return {
        "a token": call(model, 1, mask=mask),
        "tokens": call(model, 40, mask=mask),
        "crop": lambda cache: cache.crop(-min(3, cache.n_croppable)),
        "beams": lambda cache: cache.reorder_cache(torch.tensor([0, 0] if mask is None else [0, 1])),
        "rows": lambda cache: cache.batch_select_indices(torch.tensor([1, 0] if mask is None else [0, 1])),
    }


def signature(cache):
    cache.check_whole()
    states = [layer.cache.state() for layer in cache.layers]
    return [bytes_of(tensors) for tensors, _ in states], [numbers for _, numbers in states], cache.n_croppable


def outcomes(model, kind, name, *, mask=None, n_places=N_PLACES):
    """How often each outcome occurs with faults at about `n_places` places, of torch calls and of lines."""
    cache = MAKERS[kind](model)
    for n in (40, 20):
        call(model, n, mask=mask)(cache)
    change, found = changes(model, mask)[name], Counter()
    after = copy.deepcopy(cache)
    change(after)
    for of_fault in KINDS:
        for place in places(counted(of_fault, change, copy.deepcopy(cache)), n_places):
            later = call(model, 5, mask=mask)
            found[outcome(of_fault, place, cache, change, after, signature, later)] += 1
    return found


@pytest.mark.parametrize("name", ["a token", "tokens", "crop", "beams", "rows"])
@pytest.mark.parametrize("kind", ["clustered", *(slowly(kind) for kind in MAKERS if kind != "clustered")])
def test_no_call_fails_silently(model, kind, name, record_property):
    found = outcomes(model, kind, name)
    assert sum(found.values()) >= 8
    record_property("faults", dict(found))


@pytest.mark.parametrize("name", ["tokens", "crop", "rows"])
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["clustered", "recall"])
def test_no_call_with_padding_fails_silently(model, kind, name, record_property):
    padding = torch.cat([PADDED, torch.ones(2, 60, dtype=torch.bool)], dim=1)
    found = outcomes(model, kind, name, mask=padding.long())
    assert sum(found.values()) >= 8
    record_property("faults", dict(found))


def test_a_call_that_has_taken_nothing_may_be_made_again(model):
    cache = MAKERS["clustered"](model)
    call(model, 50)(cache)
    expected = copy.deepcopy(cache)
    with pytest.raises(IndexError):
        model(torch.tensor([[10**6], [0]]), past_key_values=cache)
    for each in (cache, expected):
        call(model, 30)(each)
    assert signature(cache) == signature(expected)


def test_a_cache_that_has_failed_can_be_emptied(model, monkeypatch):
    cache = MAKERS["clustered"](model)
    call(model, 40)(cache)
    with monkeypatch.context() as patch:
        patch.setattr(type(cache.layers[1]), "finish", lambda layer: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            call(model, 3)(cache)
    for use in (call(model, 1), lambda cache: cache.crop(-1), lambda cache: cache.save("/tmp/never"), signature):
        with pytest.raises(RuntimeError, match="call failed halfway; call reset"):
            use(cache)
    cache.reset()
    fresh = MAKERS["clustered"](model)
    for each in (cache, fresh):
        call(model, 40)(each)
    assert signature(cache) == signature(fresh)


def test_wrong_twin_that_looks_at_lengths_only_is_caught(model, monkeypatch):
    monkeypatch.setattr(ModelCache, "begun", property(lambda cache: None, lambda cache, begun: None), raising=True)
    with pytest.raises(SilentError):
        outcomes(model, "chelsea", "tokens", n_places=200)
