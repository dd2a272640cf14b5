"""A change of a reference's cache that fails, at whatever line: the cache is as it was, or as it should be."""

import copy
from collections import Counter

import numpy as np
import pytest
from faults import KINDS, N_PLACES, Fault, SilentError, counted, fault_at, outcome, places
from inputs import make_keys

from kvcluster import reference
from kvcluster.reference.entry_cache import EntryCache
from kvcluster.reference.llama import FullCache, Llama

LINE = KINDS[1]
SIZES = {"chunk_size": 16, "n_sink": 3, "n_recent": 40}
EXACT = {"chunk_size": 32, "n_sink": 3, "n_recent": 70, "bits": 4, "n_exact": 9}
RECALL = {"budget": 40, "n_sink": 3, "tokens_per_cluster": 4, "segment_size": 20, "prompt_segment_size": 40}
MAKERS = {
    "clustered": lambda: reference.ClusteredCache(keep_ratio=0.4, **SIZES),
    "whole heads": lambda: reference.ClusteredCache(keep_ratio=0.4, whole_heads=(1,), **SIZES),
    "bits": lambda: reference.ClusteredCache(keep_ratio=0.4, bits=4, **SIZES),
    "recent in bits": lambda: reference.ClusteredCache(keep_ratio=0.4, **EXACT),
    "attended": lambda: reference.ClusteredCache(keep_ratio=0.4, method=reference.Attended(n_shared=2), **SIZES),
    "budget": lambda: reference.BoundedCache(budget=80, keep_ratio=0.5, **SIZES),
    "ragged": lambda: reference.RaggedCache(keep_ratios=(0.3, 0.7), method=reference.Distinctive(n_shared=2), **SIZES),
    "chelsea": lambda: reference.ChelseaCache(ratio=0.5, max_new_tokens=0, interval=4, **SIZES),
    "recall": lambda: reference.RecallCache(**RECALL),
    "recall in bits": lambda: reference.RecallCache(bits=4, **RECALL),
}


def append(n, seed):
    """Take `n` tokens in one call."""

    def change(cache):
        keys, values = (make_keys("smooth", (2, n, 16), np.dtype(np.float32), seed + i) for i in range(2))
        queries = make_keys("normal", (2, 2, n, 16), np.dtype(np.float32), seed + 2)
        needs_queries = getattr(getattr(cache, "method", None), "needs_queries", False)
        cache.append(keys, values, *([queries] if needs_queries else ()))

    return change


def content(of):
    """What an object holds, in a form that can be compared."""
    if isinstance(of, np.ndarray):
        return of.dtype.name, of.shape, of.tobytes()
    if isinstance(of, dict):
        return {name: content(each) for name, each in of.items()}
    if isinstance(of, (list, tuple)):
        return [content(each) for each in of]
    return content(vars(of)) if type(of).__module__.startswith("kvcluster") else of


def prepared(kind):
    cache = MAKERS[kind]()
    append(120, 0)(cache)
    append(7, 10)(cache)
    return cache


def outcomes(cache, change, n_places):
    """How often each outcome occurs with faults before about `n_places` lines."""
    after, found = copy.deepcopy(cache), Counter()
    change(after)
    for place in places(counted(LINE, change, copy.deepcopy(cache)), n_places):
        found[outcome(LINE, place, cache, change, after, content, append(19, 40))] += 1
    return found


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("n", [1, 40])
def test_no_append_fails_silently(kind, n, record_property):
    found = outcomes(prepared(kind), append(n, 20), N_PLACES)
    assert sum(found.values()) >= 8
    assert found["before"] > 0
    assert set(found) <= {"before", "after"}
    record_property("faults", dict(found))


@pytest.mark.parametrize("kind", MAKERS)
def test_no_first_append_fails_silently(kind, record_property):
    found = outcomes(MAKERS[kind](), append(60, 20), N_PLACES)
    assert set(found) <= {"before", "after"}
    record_property("faults", dict(found))


@pytest.mark.parametrize("twin", ["in place", "one by one"])
def test_wrong_twins_that_change_the_cache_itself_are_caught(twin, monkeypatch):
    if twin == "in place":  # tokens are there before what is due has been clustered
        monkeypatch.setattr(EntryCache, "append", EntryCache.append.__wrapped__)
        cache, change = prepared("chelsea"), append(40, 20)
    else:  # heads of one ratio are ahead of the others
        cache, change = prepared("ragged"), append(1, 20)
        monkeypatch.setattr("kvcluster.reference.ragged_cache.copy.copy", lambda cache: cache)
    with pytest.raises(SilentError):
        outcomes(cache, change, None)


def llama():
    """A model of two layers, and what it is made of."""
    config = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 8}
    rng = np.random.default_rng(0)
    shapes = {"self_attn.q_proj": (8, 8), "self_attn.k_proj": (8, 8), "self_attn.v_proj": (8, 8)}
    shapes |= {"self_attn.o_proj": (8, 8), "mlp.gate_proj": (8, 8), "mlp.up_proj": (8, 8), "mlp.down_proj": (8, 8)}
    shapes |= {"input_layernorm": (8,), "post_attention_layernorm": (8,)}
    names = {f"model.layers.{layer}.{name}.weight": shape for layer in range(2) for name, shape in shapes.items()}
    names |= {"model.embed_tokens.weight": (11, 8), "model.norm.weight": (8,)}
    return Llama({name: rng.standard_normal(shape).astype(np.float32) for name, shape in names.items()}, config)


@pytest.mark.parametrize("kind", ["full", "clustered"])
def test_no_call_of_the_model_fails_silently(kind, record_property):
    model = llama()
    small = {"keep_ratio": 0.5, "chunk_size": 4, "n_sink": 1, "n_recent": 2}
    make = FullCache if kind == "full" else lambda: reference.ClusteredCache(**small)
    caches, found = [make(), make()], Counter()
    model.forward([1, 2, 3, 4, 5, 6], caches)
    after = copy.deepcopy(caches)
    model.forward([7, 8], after)
    right = model.forward([9], copy.deepcopy(after))
    for place in places(counted(LINE, lambda _: model.forward([7, 8], copy.deepcopy(caches)), None), N_PLACES):
        faulty = copy.deepcopy(caches)
        with pytest.raises(Fault), fault_at(LINE, place):
            model.forward([7, 8], faulty)
        try:
            if content(faulty) == content(caches):
                model.forward([7, 8], faulty)
            assert np.array_equal(model.forward([9], faulty), right)
            found["before or after"] += 1
        except ValueError as error:
            if "an earlier call failed halfway" not in str(error):
                raise
            found["refused"] += 1
    assert found["refused"] > 0
    assert found["before or after"] > 0
    record_property("faults", dict(found))
