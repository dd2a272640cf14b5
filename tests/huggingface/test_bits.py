"""Caches of whole models with entries in few bits: what they hold and cost, how near they are to the full one."""

import io
import json

import pytest
import torch
from agreement import at_most_in_float64
from families import MODELS, tiny
from models import greedy, random_tokens, tiny_llama
from rich.console import Console
from transformers import DynamicCache

from kvcluster import fast
from kvcluster.fast import SoftMatching
from kvcluster.fast.huggingface import ClusteredCache
from kvcluster.fast.huggingface.bytes_ratio import chosen_for_bytes, share_of_bytes

SMALL = {"chunk_size": 16, "n_sink": 2, "n_recent": 8}
RECENT_TOO = {"chunk_size": 32, "n_recent": 40, "n_exact": 5}
KINDS = {
    "alike": {"keep_ratio": 0.35, "bits": 4},
    "heads": {"keep_ratio": [[0.35, 0.2], 0.35], "bits": (4, 2)},
    "all tokens": {"keep_ratio": 1.0, "bits": 3},
    "recent too": {"keep_ratio": 0.35, "bits": 4, **RECENT_TOO},
    "heads, recent too": {"keep_ratio": [[0.35, 0.2], 0.35], "bits": (4, 2), **RECENT_TOO},
}


MODES = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "beams-several": {"num_beams": 3, "num_return_sequences": 2},
    "prompt-in-chunks": {"prefill_chunk_size": 32},
    "prompt-lookup": {"prompt_lookup_num_tokens": 3},
}


def make(model, kind, **more):
    return ClusteredCache.for_model(model, **{"method": SoftMatching(), **SMALL, **KINDS[kind], **more})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES)
def test_modes_of_generate_run_to_the_end(mode, kind):
    model, tokens = tiny_llama(layers=2), random_tokens(120)
    cache = make(model, kind)
    assert greedy(model, tokens, **MODES[mode], past_key_values=cache).shape[1] == 24
    assert cache.n_seen == 143
    assert all(layer.cache.caches[0].is_quantized for layer in cache.own_layers)


@pytest.mark.parametrize("kind", KINDS)
def test_layers_hold_their_keys_quantized(kind):
    model = tiny_llama(layers=2)
    tokens, full = random_tokens(200), DynamicCache()
    cache = make(model, kind)
    with torch.no_grad():
        for each in (full, cache):
            model(tokens, past_key_values=each)
    for stock, layer in zip(full.layers, cache.layers, strict=True):
        held = layer.cache.caches[0]
        expected = layer.make()
        assert expected.bits == held.bits
        expected.append(stock.keys, stock.values)
        for ours, theirs in zip(held.entries(), expected.entries(), strict=True):
            assert torch.equal(ours, theirs)


def test_more_bits_are_nearer_to_the_full_cache():
    model, tokens = tiny_llama(), random_tokens(300)

    def logits(cache):
        with torch.no_grad():
            model(tokens, past_key_values=cache)
            return model(random_tokens(20, seed=1), past_key_values=cache).logits

    full = logits(DynamicCache())
    errors = [
        float((logits(ClusteredCache.for_model(model, keep_ratio=1, bits=bits, **SMALL)) - full).abs().max())
        for bits in (16, 8, 4, 3, 2)
    ]
    assert errors[0] == 0
    assert errors == sorted(errors)
    assert errors[1] < errors[-1] / 10


def test_bytes_are_those_of_the_bits():
    model = tiny_llama(head_dim=64).to(torch.bfloat16)
    tokens = random_tokens(900)
    caches = {bits: ClusteredCache.for_model(model, keep_ratio=1, bits=bits, **SMALL) for bits in (16, 8, 4, 2)}
    with torch.no_grad():
        for cache in caches.values():
            model(tokens, past_key_values=cache)
    n_body = (900 - 10) // 16 * 16  # the others are sinks and recent tokens
    for bits in (8, 4, 2):
        n_quantized = n_body // 32 * 32
        of_head = n_quantized * (2 * 64 * (bits + 1) / 8 + 2) + (900 - n_quantized) * (2 * 64 * 2 + 4)
        assert caches[bits].nbytes == 3 * 2 * of_head
        assert caches[bits].report().as_dict()["nbytes"] == caches[bits].nbytes


@pytest.mark.parametrize(("bytes_ratio", "bits"), [(0.6, 8), (0.3, 4), (0.12, 4), (0.07, 4), (0.03, 3)])
def test_a_share_of_the_bytes_is_kept_to(bytes_ratio, bits):
    model = tiny_llama(head_dim=64, layers=2).to(torch.bfloat16)
    cache = ClusteredCache.for_model(model, bytes_ratio=bytes_ratio, chunk_size=256, n_sink=0, n_recent=0)
    with torch.no_grad():
        model(random_tokens(1024), past_key_values=cache)
    report = cache.report()
    assert {tuple(layer.bits) for layer in report.layers} == {(bits, bits)}
    held = cache.layers[0].cache.caches[0]
    assert held.n_exact == 0  # there is no recent window
    n_others = held.n_stored - held.n_quantized  # fewer than a group
    assert n_others < 32
    of_quantized = report.bytes_ratio - n_others * (2 * 64 * 2 + 4) / (1024 * 2 * 64 * 2)
    assert bytes_ratio - 32 / 1024 < of_quantized <= bytes_ratio + 1 / 256
    assert json.loads(json.dumps(report.as_dict())) == report.as_dict()
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(report)
    assert f" {bits} " in console.export_text()


def test_bits_of_a_share_of_the_bytes_keep_more_tokens_rather_than_exact_ones():
    shares = [chosen_for_bytes(share / 1000, tiny_llama(head_dim=64).config, 2) for share in range(5, 1000)]
    kept, bits = zip(*shares, strict=True)
    assert list(bits) == sorted(bits)
    for number in set(bits):
        of_bits = [keep for keep, each in shares if each == number]
        assert of_bits == sorted(of_bits)
    assert kept[-1] == 1.0
    for share, (keep, each) in zip(range(5, 1000), shares, strict=True):
        assert at_most_in_float64(share_of_bytes(each, 64, 2) * keep, share / 1000)


@pytest.mark.parametrize("name", MODELS)
def test_every_family_is_served(name):
    model, sliding = tiny(name)
    cache = ClusteredCache.for_model(model, keep_ratio=0.5, bits=4, **SMALL)
    greedy(model, random_tokens(120), n_new=20, past_key_values=cache)
    for index, layer in enumerate(cache.layers):
        assert index in sliding or layer.cache.caches[0].is_quantized


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_eager_attention_attends_to_what_is_read_back(attention):
    model, plain = tiny_llama(attention=attention), tiny_llama()
    ours = greedy(model, random_tokens(150), past_key_values=make(model, "all tokens"))
    other = greedy(plain, random_tokens(150), past_key_values=make(plain, "all tokens"))
    assert torch.equal(ours, other)


def test_whole_heads_are_heads_of_ratio_one():
    model = tiny_llama()
    cache = make(model, "alike", whole_heads=[(0, 1), (2, 0)])
    same = make(model, "alike", keep_ratio=[[0.35, 1.0], 0.35, [1.0, 0.35]])
    with torch.no_grad():
        for each in (cache, same):
            model(random_tokens(200), past_key_values=each)
    assert cache.nbytes == same.nbytes
    assert isinstance(cache.layers[0].cache.caches[0], fast.RaggedCache)
    for ours, theirs in zip(cache.layers, same.layers, strict=True):
        assert torch.equal(ours.keys, theirs.keys)


@pytest.mark.parametrize(
    ("parameters", "error", "message"),
    [
        ({"keep_ratio": 0.5, "bits": 6}, ValueError, "bits must be 16, or 8, 4, 3 or 2"),
        ({"bytes_ratio": 1.0}, ValueError, r"bytes_ratio must be in \(0, 1\), got 1.0"),
        ({"bytes_ratio": "0.1"}, TypeError, "bytes_ratio must be a number, got '0.1'"),
        ({"bytes_ratio": 0.1, "bits": 4}, ValueError, "bytes_ratio must be given without keep_ratio, budget and bits"),
        ({"bytes_ratio": 0.1, "keep_ratio": 0.5}, ValueError, "bytes_ratio must be given without keep_ratio"),
        ({"keep_ratio": 0.5, "n_exact": 4}, ValueError, "n_exact must be None with 16 bits, where all is exact, got 4"),
        ({"keep_ratio": 0.5, "bits": 4, "n_exact": 9}, ValueError, "n_exact must be at most n_recent, got 9 > 8"),
        ({"bytes_ratio": 0.1, "n_exact": 4}, ValueError, "chunk_size must be a multiple of 32 with n_exact, got 16"),
        ({"budget": 60, "n_exact": 4, "method": SoftMatching()}, ValueError, "n_exact must be None with 16 bits"),
        ({"keep_ratio": 0.5, "bits": None}, TypeError, "bits must be an integer, or one for keys and one for values"),
        (
            {"budget": 60, "bits": 4, "method": SoftMatching()},
            ValueError,
            "bits must be 16 with a budget, which merges entries again, got 4",
        ),
        (
            {"keep_ratio": [[0.5, 0.2], 0.5, 0.5], "whole_heads": [(0, 1)], "bits": 4},
            ValueError,
            "keep_ratio must be one number for a layer with a budget or whole_heads",
        ),
    ],
)
def test_bits_that_cannot_be_served_are_refused(parameters, error, message):
    with pytest.raises(error, match=message):
        ClusteredCache.for_model(tiny_llama(), **parameters, **SMALL)


@pytest.mark.parametrize(("sizes", "n_exact"), [({}, 32), ({"n_recent": 9}, 9), ({"chunk_size": 48}, None)])
def test_a_share_of_the_bytes_leaves_few_tokens_exact(sizes, n_exact):
    cache = ClusteredCache.for_model(tiny_llama(), bytes_ratio=0.1, **sizes)
    assert cache.parameters["n_exact"] == n_exact
    given = ClusteredCache.for_model(tiny_llama(), bytes_ratio=0.1, n_exact=0)
    assert given.parameters["n_exact"] == 0


@pytest.mark.parametrize("kind", KINDS)
def test_files_hold_what_is_quantized(kind, tmp_path):
    model, tokens = tiny_llama(layers=2), random_tokens(220)
    cache = make(model, kind)
    with torch.no_grad():
        model(tokens[:, :200], past_key_values=cache)
    cache.save(tmp_path / "cache.safetensors")
    loaded = ClusteredCache.load(tmp_path / "cache.safetensors", model)
    with torch.no_grad():
        ours, theirs = (model(tokens[:, 200:], past_key_values=each).logits for each in (loaded, cache))
    assert torch.equal(ours, theirs)
    assert loaded.nbytes == cache.nbytes
    assert loaded.parameters == cache.parameters
