"""torch.compile beside our caches: the model is compiled, and what they decide is not."""

import gc
import os
import shutil

import pytest
import torch
from agreement import assert_same_bits
from caches import of_reference
from inputs import slowly
from models import greedy, random_tokens, tiny_llama
from transformers import CompileConfig

from kvcluster.fast import Attended, SoftMatching
from kvcluster.fast.huggingface import ChelseaCache, ClusteredCache, RecallCache

PARAMETERS = {"keep_ratio": 0.25, "chunk_size": 16, "n_sink": 2, "n_recent": 8, "method": SoftMatching()}
COMPRESSED = {"ratio": 0.25, "max_new_tokens": 20, "interval": 3, "chunk_size": 16, "n_sink": 2, "n_recent": 8}
COMPRESSED |= {"whole_heads": [(0, 1)]}
RECALLED = {"budget": 40, "n_sink": 4, "tokens_per_cluster": 4, "segment_size": 16, "prompt_segment_size": 32}
MAKE = {
    "clustered": lambda model: ClusteredCache.for_model(model, **PARAMETERS),
    "chelsea": lambda model: ChelseaCache.for_model(model, **COMPRESSED),
    "ragged": lambda model: ClusteredCache.for_model(
        model, **PARAMETERS | {"keep_ratio": [[0.2, 0.7]] * len(model.model.layers)}
    ),
    "attended": lambda model: ClusteredCache.for_model(
        model, **PARAMETERS | {"method": Attended(n_shared=1), "n_recent": 32}
    ),
    "recall": lambda model: RecallCache.for_model(model, **RECALLED),
    "stock": lambda model: None,
}
CACHES = pytest.mark.parametrize("name", ["clustered", "ragged", "attended", "chelsea", "recall"])
COMPILER = next(filter(shutil.which, [os.environ.get("CXX", "g++"), "g++", "clang++"]), None)


@pytest.fixture(autouse=True)
def forget_compiled_code():
    yield
    torch.compiler.reset()


def generate(model, name, **kwargs):
    return greedy(model, random_tokens(70), n_new=20, past_key_values=MAKE[name](model), **kwargs)


def check_in_turns(model):
    """Each cache, made when the model is compiled already, leads to the tokens it leads to without compilation."""
    plain = tiny_llama(layers=1)
    expected = {name: generate(plain, name) for name in MAKE}
    assert len({tuple(tokens.flatten().tolist()) for tokens in expected.values()}) == len(MAKE)
    for name in ("stock", "clustered", "stock", "recall", "attended", "chelsea", "clustered"):
        assert torch.equal(generate(model, name), expected[name]), name
        gc.collect()  # the hooks go with the cache


@pytest.mark.slow
def test_a_compiled_forward_generates_the_same_tokens_with_every_cache_in_turn():
    model = tiny_llama(layers=1)
    model.forward = torch.compile(model.forward, backend="eager")
    check_in_turns(model)


@pytest.mark.slow
def test_a_model_compiled_in_place_generates_the_same_tokens_with_every_cache_in_turn():
    model = tiny_llama(layers=1)
    model.compile(backend="eager")
    check_in_turns(model)


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="torch.compile needs a C++ compiler on the CPU")
def test_what_compiled_code_computes_is_clustered_exactly(monkeypatch):
    """Keys of torch's own compiler may have other bits; what is made of them has those of the reference."""
    model = tiny_llama(layers=1)
    uncompiled = generate(model, "clustered")
    cache = MAKE["clustered"](model)
    entries = cache.layers[0].cache.caches[0]
    taken, extend = [], entries.extend

    def listening(keys, values):
        taken.append((keys.numpy().copy(), values.numpy().copy()))
        extend(keys, values)

    monkeypatch.setattr(entries, "extend", listening)
    monkeypatch.setattr(torch.compiler.config, "force_disable_caches", True)  # they may hold another processor's code
    model.forward = torch.compile(model.forward, options={"compile_threads": 1})
    assert torch.equal(greedy(model, random_tokens(70), n_new=20, past_key_values=cache), uncompiled)
    assert [keys.shape[2] for keys, _ in taken] == [70] + [1] * 19
    expected = of_reference(**PARAMETERS)
    for keys, values in taken:
        expected.append(keys, values)
    assert expected.n_stored < expected.n_seen == 89
    for part in ("keys", "values", "counts"):
        assert_same_bits(getattr(entries, part), getattr(expected, part))


@pytest.mark.slow
@CACHES
def test_a_cache_made_for_the_wrapper_is_one_made_for_the_model(name):
    model, tokens = tiny_llama(layers=1), random_tokens(70)
    cache_of_model = MAKE[name](model)
    wrapper = torch.compile(model, backend="eager")
    cache = MAKE[name](wrapper)
    assert cache._hooks is cache_of_model._hooks
    with torch.no_grad():
        for piece in (tokens, tokens[:, :1]):
            logits = wrapper(piece, past_key_values=cache).logits
            assert torch.equal(logits, model(piece, past_key_values=cache_of_model).logits)
    assert cache.n_seen == 71


@CACHES
def test_one_graph_is_refused_with_the_reason(name):
    model = tiny_llama(layers=1)
    compiled = torch.compile(model.forward, backend="eager", fullgraph=True)
    cache = MAKE[name](model)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="compile the model without fullgraph=True"):
        compiled(random_tokens(70), past_key_values=cache)
    assert cache.n_seen == 0


@pytest.mark.parametrize("name", ["clustered", slowly("recall")])
def test_generate_does_not_compile_for_our_caches(name):
    """It compiles by itself only for caches that say they can be compiled, on a GPU or where it is told to."""
    model = tiny_llama(layers=1)
    everywhere = CompileConfig(backend="eager")
    everywhere._compile_all_devices = True
    ours = generate(model, name, compile_config=everywhere)
    assert torch.equal(ours, generate(model, name))
    assert not MAKE[name](model).is_compileable
    assert not hasattr(model, "_compiled_call")
    greedy(model, random_tokens(70), n_new=2, cache_implementation="static", compile_config=everywhere)
    assert hasattr(model, "_compiled_call")  # so it does for a static cache
