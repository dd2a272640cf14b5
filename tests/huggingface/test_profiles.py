"""Profiles are found by a model's weights: those that ship, and those of a file of `kvcluster tune`."""

import copy
import json
import logging
import math

import numpy as np
import pytest
import torch
from agreement import assert_same_bits, numbers_agree
from hypothesis import given
from hypothesis import strategies as st
from models import random_tokens, tiny_llama
from transformers import DynamicCache

from kvcluster import reference
from kvcluster.evaluation.models import load_model
from kvcluster.fast import Attended, Distinctive, RaggedCache, SoftMatching
from kvcluster.fast.huggingface import (
    ClusteredCache,
    Profile,
    known_profile,
    known_whole_heads,
    profiles,
    whole_heads_of,
)
from kvcluster.fast.huggingface.fingerprints import fingerprint, weights_digest

HEADS = [[2, 1], [0, 0], [1, 1], [2, 0], [1, 0], [0, 1]]
SHARES = [[[0.1, 0.05], [0.1, 0.1], [0.05, 0.2]], [[0.5, 0.3], [0.4, 0.6], [0.2, 1.0]]]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SMALL = {"chunk_size": 16, "n_sink": 2, "n_recent": 8}


def result_for(model, **changes):
    """What matters of a result of `kvcluster tune`."""
    weights = {str(dtype).removeprefix("torch."): weights_digest(model, dtype) for dtype in DTYPES}
    result = {"name": "tiny", "weights": weights, "layers": [0, 1, 2], "keeps": [0.1, 0.5], "shares": SHARES}
    return result | {"heads": HEADS} | changes


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "tuned.json"
    path.write_text(json.dumps(result_for(tiny_llama())))
    return path


@pytest.fixture
def ships(monkeypatch, tmp_path):
    """Let the package ship the heads of one tiny model."""
    (tmp_path / profiles.DATA).write_text(json.dumps([result_for(tiny_llama())]))
    monkeypatch.setattr(profiles, "files", lambda package: tmp_path)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_digest_of_another_dtype_is_that_of_the_model_in_it(dtype):
    model = tiny_llama()
    assert fingerprint(copy.deepcopy(model).to(dtype))["weights"] == weights_digest(model, dtype)
    assert len({weights_digest(model, each) for each in DTYPES}) == 3


@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_are_known_of_a_model_in_every_dtype(ships, path, dtype):
    model = tiny_llama().to(dtype)
    for find in (known_whole_heads, lambda *given: whole_heads_of(path, *given)):
        assert find(model) == [(2, 1)]
        assert find(model, 3) == [(2, 1), (0, 0), (1, 1)]
        assert find(model, 6) == [tuple(pair) for pair in HEADS]


def test_a_model_with_other_weights_has_no_known_profile(ships, path):
    model = tiny_llama(seed=1)
    with pytest.raises(LookupError, match=r"known \(tiny\), got a llama with other weights: `kvcluster tune MODEL"):
        known_profile(model)
    match = rf"tune` made for model, whose weights are {weights_digest(model)[:12]}\.\.\., got one for tiny"
    for use in (
        lambda: whole_heads_of(path, model),
        lambda: ClusteredCache.for_model(model, keep_ratio=0.5, profile=path),
        lambda: ClusteredCache.for_model(model, keep_ratio=0.5, profile=Profile.read(path)),
    ):
        with pytest.raises(ValueError, match=match):
            use()


@pytest.mark.parametrize(
    ("n_heads", "error", "message"),
    [
        (0, ValueError, "n_heads must be at least 1, got 0"),
        (7, ValueError, "n_heads must be at most 6, the KV heads that attend to everything, got 7"),
        (1.5, TypeError, "n_heads must be an integer, got 1.5"),
    ],
)
def test_a_number_of_heads_out_of_range_is_refused(ships, path, n_heads, error, message):
    for find in (known_whole_heads, lambda *given: whole_heads_of(path, *given)):
        with pytest.raises(error, match=message):
            find(tiny_llama(), n_heads)


@pytest.mark.parametrize("content", ["no JSON", "{}", '{"weights": {}}', "[]", "3"])
def test_another_file_is_refused(tmp_path, content):
    (tmp_path / "file").write_text(content)
    with pytest.raises(ValueError, match=r"path must be a file that `kvcluster tune --json` wrote, got .*file: "):
        Profile.read(tmp_path / "file")
    (tmp_path / "file").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="path must be a file that `kvcluster tune --json` wrote"):
        whole_heads_of(tmp_path / "file", tiny_llama())
    with pytest.raises(FileNotFoundError):
        ClusteredCache.for_model(tiny_llama(), keep_ratio=0.5, profile=tmp_path / "none")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keeps": [0.5, 0.1]}, r"keeps must ascend in \(0, 1\), got \(0.5, 0.1\)"),
        ({"keeps": [0.1, 1.0]}, r"keeps must ascend in \(0, 1\)"),
        ({"keeps": [0.1]}, "shares must be keeps x layers x KV heads"),
        ({"layers": [0, 1]}, "shares must be keeps x layers x KV heads"),
        ({"shares": [SHARES[0], [[2.0, 0.3], *SHARES[1][1:]]]}, r"shares must be in \[0, 1\], got .* to 2.0"),
        ({"shares": [SHARES[0], [[float("nan"), 0.3], *SHARES[1][1:]]]}, r"shares\[1\]\[0\]\[0\] of it must be a fin"),
        ({"heads": HEADS[:-1]}, "heads must be every KV head of every layer, once"),
        ({"heads": [*HEADS[:-1], [0, 0]]}, "heads must be every KV head of every layer, once"),
        ({"weights": 3}, "path must be a file that"),
        ({"shares": []}, "path must be a file that"),
    ],
)
def test_numbers_that_make_no_profile_are_refused(tmp_path, changes, message):
    (tmp_path / "file").write_text(json.dumps(result_for(tiny_llama(), **changes)))
    with pytest.raises(ValueError, match=message):
        Profile.read(tmp_path / "file")


def entries_of(ratios, chunk_size):
    """What a cache makes of the ratios of all heads."""
    return [math.ceil(ratio * chunk_size) for of_layer in ratios for ratio in np.ravel(of_layer)]


@given(keep=st.floats(0.01, 1), chunk_size=st.integers(1, 300))
def test_entries_are_whole_numbers_that_keep_the_mean(keep, chunk_size):
    profile = Profile.of(result_for(tiny_llama()))
    shares = profile.shares_at(keep)
    if keep in (0.1, 0.5, 1):
        assert shares == {0.1: SHARES[0], 0.5: SHARES[1], 1: [[1.0] * 2] * 3}[keep]
    if math.floor(keep * chunk_size * 6) < 6:
        with pytest.raises(ValueError, match="keep_ratio must leave an entry of a chunk for each of 6 heads"):
            profile.keep_ratios(keep, chunk_size=chunk_size, n_layers=3)
        return
    ratios = profile.keep_ratios(keep, chunk_size=chunk_size, n_layers=3)
    ratios = [of_layer if isinstance(of_layer, tuple) else (of_layer,) * 2 for of_layer in ratios]
    entries = entries_of(ratios, chunk_size)
    assert sum(entries) <= keep * chunk_size * 6 < sum(entries) + 7 or min(entries) == chunk_size
    assert all(max(1, round(int(keep * chunk_size * 6) / 48)) <= n <= chunk_size for n in entries)
    by_share = [n for _, n in sorted(zip(np.ravel(shares), entries, strict=True))]
    assert by_share == sorted(by_share)


def test_shares_between_two_that_were_measured_have_the_mean():
    profile = Profile.of(result_for(tiny_llama()))
    assert numbers_agree(np.ravel(profile.shares_at(0.3)).tolist(), (np.ravel(SHARES).reshape(2, 6).mean(0)).tolist())
    assert numbers_agree(np.ravel(profile.shares_at(0.05)).tolist(), (np.ravel(SHARES[0]) / 2).tolist())
    assert numbers_agree(np.ravel(profile.shares_at(0.75)).tolist(), ((1 + np.ravel(SHARES[1])) / 2).tolist())


def read(model, cache, n_tokens=150):
    with torch.no_grad():
        model(random_tokens(n_tokens), past_key_values=cache)
    return cache


@pytest.mark.parametrize("given_as", ["file", "profile", "known"])
def test_a_cache_shares_out_its_entries_by_the_profile(ships, path, given_as):
    model, stock = tiny_llama(), DynamicCache()
    chosen = {"file": path, "profile": Profile.read(path), "known": "known"}[given_as]
    cache = read(model, ClusteredCache.for_model(model, keep_ratio=0.5, profile=chosen, **SMALL))
    with torch.no_grad():
        model(random_tokens(150), past_key_values=stock)
    ratios = Profile.read(path).keep_ratios(0.5, chunk_size=16, n_layers=3)
    assert cache.parameters["keep_ratio"] == ratios
    assert entries_of(ratios, 16) == [8, 5, 6, 10, 3, 16]
    for layer, theirs, of_layer in zip(cache.layers, stock.layers, ratios, strict=True):
        [ours] = layer.cache.caches
        assert isinstance(ours, RaggedCache) == isinstance(of_layer, tuple)
        kind = (
            (reference.RaggedCache, "keep_ratios")
            if isinstance(of_layer, tuple)
            else (reference.ClusteredCache, "keep_ratio")
        )
        expected = kind[0](**{kind[1]: of_layer}, method=reference.Distinctive(), **SMALL)
        expected.append(theirs.keys.numpy(), theirs.values.numpy())
        for array, right in zip(ours.entries(), expected.entries(), strict=True):
            assert_same_bits(array, right)


def test_nothing_but_a_single_ratio_of_distinctive_matching_takes_what_ships(ships):
    model = tiny_llama()
    for parameters in (
        {"keep_ratio": 0.5, "profile": None},
        {"keep_ratio": 0.5, "method": SoftMatching()},
        {"keep_ratio": [0.5, 0.5, 0.5]},
        {"keep_ratio": 1},
        {"keep_ratio": 0.5, "whole_heads": [(0, 1)]},
        {"keep_ratio": 0.5, "n_dense_layers": 1},
        {"budget": 60, "method": SoftMatching()},
    ):
        cache = ClusteredCache.for_model(model, **parameters, **SMALL)
        assert not any(isinstance(layer.cache.caches[0], RaggedCache) for layer in cache.layers), parameters


@pytest.mark.parametrize(
    "parameters", [{"budget": 60}, {"whole_heads": [(0, 1)]}, {"n_dense_layers": 1}, {"keep_ratio": [0.5] * 3}]
)
def test_a_profile_beside_what_tells_heads_apart_is_refused(path, parameters):
    with pytest.raises(ValueError, match="profile needs a single keep_ratio, no budget, no whole_heads and no n_dense"):
        ClusteredCache.for_model(tiny_llama(), **{"keep_ratio": 0.5} | parameters, profile=path, **SMALL)


def test_without_a_profile_the_log_says_once_where_one_would_come_from(ships, caplog):
    profiles.say_once.cache_clear()
    model = tiny_llama(seed=1)
    with caplog.at_level(logging.WARNING, "kvcluster"):
        for _ in range(2):
            cache = ClusteredCache.for_model(model, keep_ratio=0.5, **SMALL)
        ClusteredCache.for_model(model, keep_ratio=0.5, profile=None, **SMALL)
        ClusteredCache.for_model(tiny_llama(), keep_ratio=0.5, **SMALL)
    [record] = caplog.records
    assert "all KV heads keep the same share" in record.message
    assert "`kvcluster tune MODEL --json FILE` makes a profile, to be given as profile=FILE" in record.message
    assert cache.parameters["keep_ratio"] == 0.5


WITHOUT = {
    "fewer entries": ({"keep_ratio": 0.09}, {}),
    "a small window": ({"n_recent": 31}, {}),
    "eager": ({}, {"attention": "eager"}),
    "no profile": ({"profile": None}, {}),
    "another method": ({"method": SoftMatching()}, {}),
}


@pytest.mark.parametrize("kind", [None, *WITHOUT])
def test_attended_matching_is_the_default_where_the_profile_says_so(kind, tmp_path):
    parameters, options = ({}, {}) if kind is None else WITHOUT[kind]
    model, path = tiny_llama(**options), tmp_path / "tuned.json"
    path.write_text(json.dumps(result_for(model, attended=[0, 2])))
    sizes = {"keep_ratio": 0.1, "n_recent": 32, "profile": path}
    cache = ClusteredCache.for_model(model, **SMALL | sizes | parameters)
    expected = parameters.get("method", Distinctive())
    methods = [expected] * 3 if kind else [Attended(), Distinctive(), Attended()]
    given = cache.parameters["method"]
    assert (given if isinstance(given, list) else [given] * 3) == methods


def test_a_profile_that_does_not_say_leaves_attended_matching_to_who_asks_for_it(path):
    model = tiny_llama()
    sizes = SMALL | {"keep_ratio": 0.3, "n_recent": 32, "profile": path}
    assert ClusteredCache.for_model(model, **sizes).parameters["method"] == Distinctive()
    asked = ClusteredCache.for_model(model, **sizes, method=Attended())
    assert asked.parameters["method"] == [Attended()] * 3


def test_a_saved_cache_is_that_of_its_profile_whatever_ships(ships, path, tmp_path, monkeypatch):
    model = tiny_llama()
    cache = read(model, ClusteredCache.for_model(model, keep_ratio=0.5, **SMALL))
    cache.save(tmp_path / "cache.safetensors")
    (tmp_path / profiles.DATA).write_text("[]")
    loaded = ClusteredCache.load(tmp_path / "cache.safetensors", model)
    for layer, other in zip(cache.layers, loaded.layers, strict=True):
        for ours, theirs in zip(layer.cache.caches[0].entries(), other.cache.caches[0].entries(), strict=True):
            assert torch.equal(ours, theirs)


def test_what_ships_has_every_head_of_its_layers_once():
    shipped = list(profiles.shipped())
    assert len(shipped) > 0
    for profile in shipped:
        assert sorted(profile.weights) == ["bfloat16", "float16", "float32"]
        for keep, shares in zip(profile.keeps, profile.shares, strict=True):
            assert round(float(np.mean(shares)), 2) == keep


def test_of_gemma_the_layer_stays_whole_with_which_the_published_method_loses_least():
    [profile] = [profile for profile in profiles.shipped() if profile.name.startswith("Gemma")]
    assert profile.whole_heads() == [(11, 0)]
    assert profile.heads == ((11, 0), (5, 0), (17, 0))


@pytest.mark.slow
@pytest.mark.xdist_group("smollm2")
def test_heads_of_smollm2_ship():
    model, _ = load_model(None)
    assert known_whole_heads(model) == [(18, 2), (20, 2), (20, 1), (17, 1)]
    cache = ClusteredCache.for_model(model, keep_ratio=0.25)
    assert any(isinstance(layer.cache.caches[0], RaggedCache) for layer in cache.layers)
    assert len(set(known_whole_heads(model, 90))) == 90
    with torch.no_grad():
        model.get_input_embeddings().weight[0] += 1
    with pytest.raises(LookupError, match="SmolLM2"):
        known_whole_heads(model)
