"""Unusual settings, models and prompts: the right value, or a clear error by name and nothing lost."""

import copy
import io
import json
import pickle
from fractions import Fraction

import numpy as np
import pytest
import torch
from models import greedy, random_tokens, tiny_llama

from kvcluster.fast import SoftMatching
from kvcluster.fast.huggingface import ChelseaCache, ClusteredCache, RecallCache
from kvcluster.fast.huggingface.fingerprints import plain
from kvcluster.fast.huggingface.profiles import Profile

SIZES = {"chunk_size": 16, "n_sink": 2, "n_recent": 4}
MAKERS = {
    "clustered": lambda model: ClusteredCache.for_model(model, keep_ratio=0.5, method=SoftMatching(), **SIZES),
    "chelsea": lambda model: ChelseaCache.for_model(model, ratio=0.5, max_new_tokens=3, whole_heads=(), **SIZES),
    "recall": lambda model: RecallCache.for_model(model, budget=30, n_sink=2, segment_size=8),
}
TOKENS = random_tokens(60)


@pytest.fixture(scope="module")
def model():
    return tiny_llama(layers=2)


def used(model, make, tokens=TOKENS):
    cache = make(model)
    with torch.no_grad():
        model(tokens, past_key_values=cache)
    return cache


SAME = {
    "an array of one number": ({"keep_ratio": np.array(0.5)}, {"keep_ratio": 0.5}),
    "a tensor": ({"keep_ratio": torch.tensor(0.5)}, {"keep_ratio": 0.5}),
    "an array": ({"keep_ratio": np.array([0.5, 0.25])}, {"keep_ratio": [0.5, 0.25]}),
    "an array of heads": ({"keep_ratio": np.array([[0.5, 1], [1, 0.25]])}, {"keep_ratio": [(0.5, 1.0), (1.0, 0.25)]}),
    "arrays in a list": ({"keep_ratio": [np.array([0.5, 1]), np.float32(0.5)]}, {"keep_ratio": [(0.5, 1.0), 0.5]}),
    "a fraction": ({"keep_ratio": Fraction(1, 4)}, {"keep_ratio": 0.25}),
    "a share": ({"keep_ratio": 0.5, "recent_share": np.float16(0.25)}, {"keep_ratio": 0.5, "recent_share": 0.25}),
    "budgets": (
        {"budget": np.array([40, 50]), "method": SoftMatching(), "n_dense_layers": np.int8(0)},
        {"budget": [40, 50], "method": SoftMatching(), "n_dense_layers": 0},
    ),
    "whole heads": (
        {"keep_ratio": 0.5, "whole_heads": [(np.uint8(0), np.int64(1))]},
        {"keep_ratio": 0.5, "whole_heads": [(0, 1)]},
    ),
    "bits": ({"keep_ratio": 0.5, "bits": np.uint8(4)}, {"keep_ratio": 0.5, "bits": 4}),
}


@pytest.mark.parametrize("case", SAME)
def test_settings_of_other_libraries_are_as_those_of_python(model, case):
    settings, alike = SAME[case]
    sizes = {name: np.uint8(size) for name, size in SIZES.items()}
    cache = ClusteredCache.for_model(model, **settings, **sizes)
    expected = ClusteredCache.for_model(model, **alike, **SIZES)
    assert repr(cache.parameters) == repr(expected.parameters)
    assert torch.equal(greedy(model, TOKENS, past_key_values=cache), greedy(model, TOKENS, past_key_values=expected))


@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.uint16, np.uint64])
def test_parameters_are_plain_whatever_integers_were_given(model, kind):
    sizes = {"n_sink": kind(2), "n_recent": kind(4)}
    whole = {"max_new_tokens": kind(5), "interval": kind(3), "whole_heads": [(kind(0), kind(1))]}
    segments = {"segment_size": kind(8), "init_seed": kind(100), "n_dense_layers": kind(1)}
    for cache in (
        ChelseaCache.for_model(model, ratio=np.float32(0.5), chunk_size=kind(16), **sizes, **whole),
        RecallCache.for_model(model, budget=kind(30), **sizes, **segments),
    ):
        assert json.dumps(cache.parameters) == json.dumps(cache.parameters, default=plain)


REFUSED = {
    "text": ({"keep_ratio": "0.5"}, TypeError, "keep_ratio must be a number, got '0.5'"),
    "a mapping": ({"keep_ratio": {"a": 1}}, TypeError, "keep_ratio must be a number, got"),
    "a complex number": ({"keep_ratio": 0.5 + 0j}, TypeError, "keep_ratio must be a number, got"),
    "arrays of other layers": ({"keep_ratio": np.ones(3)}, ValueError, "keep_ratio must be one number or one for each"),
    "half a layer": ({"keep_ratio": 0.5, "n_dense_layers": 1.5}, TypeError, "n_dense_layers must be an integer, got 1"),
    "a layer in words": ({"keep_ratio": 0.5, "n_dense_layers": "1"}, TypeError, "n_dense_layers must be an integer"),
    "too many layers": ({"keep_ratio": 0.5, "n_dense_layers": 3}, ValueError, "n_dense_layers must be from 0 to the"),
    "half a budget": ({"budget": 40.5, "method": SoftMatching()}, TypeError, "budget must be an integer, got 40.5"),
    "a share in words": ({"keep_ratio": 0.5, "recent_share": "all"}, TypeError, "recent_share must be a number, got"),
    "a chunk in words": (
        {"bytes_ratio": 0.1, "chunk_size": "64"},
        TypeError,
        "chunk_size must be an integer",
    ),
    "bytes in words": ({"bytes_ratio": "half"}, TypeError, "bytes_ratio must be a number, got 'half'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_settings_are_refused_by_name(model, case):
    settings, kind, words = REFUSED[case]
    with pytest.raises(kind, match=words):
        ClusteredCache.for_model(model, **settings)


def test_a_profile_is_not_asked_for_more_layers_than_models_have():
    profile = Profile("x", {}, (0,), (0.5,), (((0.5,),),), ((0, 0),))
    assert len(profile.keep_ratios(0.5, chunk_size=16, n_layers=2)) == 2
    with pytest.raises(ValueError, match="n_layers must be at most 10000, got 2147483648"):
        profile.keep_ratios(0.5, chunk_size=16, n_layers=2**31)


@pytest.mark.parametrize("kind", MAKERS)
def test_a_cache_is_copied_but_not_pickled(model, kind):
    cache = used(model, MAKERS[kind])
    for store in (pickle.dumps, lambda cache: torch.save(cache, io.BytesIO())):
        with pytest.raises(TypeError, match=r"must be stored by its own save\(path\), which load\(path, model\) reads"):
            store(cache)
    assert copy.copy(cache).layers is cache.layers
    other = copy.deepcopy(cache)
    greedy(model, torch.cat([TOKENS, TOKENS[:, :5]], dim=1), n_new=2, past_key_values=other)
    assert (cache.n_seen, other.n_seen) == (60, 66)


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("wrong", ["1", 1.0, None, True])
def test_what_is_no_number_of_tokens_or_rows_is_refused_and_nothing_is_lost(model, kind, wrong):
    cache = used(model, MAKERS[kind])
    with pytest.raises(TypeError, match="tokens_to_remove must be an integer, got "):
        cache.crop(wrong)
    with pytest.raises(TypeError, match="repeats must be an integer, got "):
        cache.batch_repeat_interleave(wrong)
    for rows in ([0], torch.tensor([1]), torch.tensor([0.0])):
        with pytest.raises((TypeError, ValueError), match="indices must be "):
            cache.reorder_cache(rows)
    cache.crop(np.int8(-2))
    cache.batch_repeat_interleave(np.uint8(2))
    with torch.no_grad():
        model(TOKENS[:, :3].repeat(2, 1), past_key_values=cache)
    assert cache.n_seen == 61


@pytest.mark.parametrize("kind", MAKERS)
def test_a_shorter_prompt_for_a_used_cache_is_refused_and_nothing_is_lost(model, kind):
    cache = used(model, MAKERS[kind])
    with pytest.raises(ValueError, match="input_ids must hold a token behind the 60 that the cache has seen, got none"):
        greedy(model, random_tokens(20, seed=5), n_new=3, past_key_values=cache)
    longer = torch.cat([TOKENS, TOKENS[:, :5]], dim=1)
    expected = greedy(model, longer, n_new=3, past_key_values=used(model, MAKERS[kind]))
    assert torch.equal(greedy(model, longer, n_new=3, past_key_values=cache), expected)


@pytest.mark.parametrize("kind", MAKERS)
def test_questions_of_different_lengths_behind_one_text_are_refused_with_the_way_to_ask_them(model, kind):
    cache = used(model, MAKERS[kind], TOKENS.repeat(2, 1))
    mask = torch.ones(2, 70, dtype=torch.int64)
    mask[0, 60:64] = 0
    with pytest.raises(ValueError, match=r"different lengths .* one by one, each of a copy.deepcopy of the cache"):
        model(random_tokens(10, batch=2), past_key_values=cache, attention_mask=mask)
    assert cache.n_seen == 60


def test_a_model_without_some_of_its_layers_is_refused():
    shorter = tiny_llama(layers=3)
    shorter.model.layers = shorter.model.layers[:2]
    for make in MAKERS.values():
        with pytest.raises(ValueError, match="num_hidden_layers of model must be its attention modules, 2, got 3"):
            make(shorter)


def test_prefix_tuning_is_refused_by_name():
    peft = pytest.importorskip("peft")
    tuned = peft.get_peft_model(
        tiny_llama(layers=2), peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    )
    for make in MAKERS.values():
        with pytest.raises(ValueError, match=r"adapters of model must not be prefix tuning, .* got 'default'"):
            make(tuned)
