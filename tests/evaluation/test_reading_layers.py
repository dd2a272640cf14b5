"""Which layers answers read from, and the ablation: the rule, the scoring, and a default that is the package's."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from agreement import equal_in_float32, numbers_agree
from evaluation_inputs import character_tokenizer, long_llama, save_character_llama, short_text

from kvcluster.evaluation.quality import needle_cases
from kvcluster.evaluation.quality.scoring import fill, following_nll, prefill, score_needles
from kvcluster.evaluation.runs import stored_sums
from kvcluster.evaluation.texts import encode
from kvcluster.fast import distinctive_matching
from kvcluster.fast.huggingface import ClusteredCache

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
HEADS, TOKENS, DIM = 3, 600, 16


@pytest.fixture(scope="module")
def case():
    tokenizer = character_tokenizer()
    text = encode(tokenizer, short_text())
    [made] = needle_cases(tokenizer, text, "tuning", lengths=[TOKENS], n_contexts=1, n_needles=3, n_following=40)
    return made


def arrays(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(HEADS, TOKENS, DIM, generator=generator) + 0.3 for _ in range(2)]


def context_of(model, case):
    from benchmarks.ablation.packed_scoring import Context

    full = prefill(model, lambda model: None, case.tokens)
    return Context(case, [(layer.keys[0], layer.values[0]) for layer in full.layers]), full


def test_rule_takes_the_two_that_are_missed_most_first_then_those_of_most_mass():
    """Neither mass nor loss alone gives the list; of six candidates the two that are missed least are left out."""
    from benchmarks.ablation.reading_layers import choose_reading_layers

    mass = [0.9, 0.1, 0.8, 0.3, 0.6, 0.7, 0.2]
    without = {0: 0.5, 2: 0.31, 3: 2.0, 4: 0.45, 5: 0.3, 6: 1.0}
    found = choose_reading_layers(mass, without, n_reading=4)
    assert found == [3, 6, 0, 4]
    assert choose_reading_layers(mass, without | {4: 0.6}, n_reading=4) == found, "order within the rest is by mass"
    assert choose_reading_layers(mass, without | {2: 0.6}, n_reading=4) == [3, 6, 0, 2]


@pytest.mark.parametrize("target", [1, 2, 5, 30, 99])
def test_default_variant_clusters_as_the_package(target):
    from benchmarks.ablation.variants import Settings, cluster_distinctive

    keys, values = arrays(target)
    expected = distinctive_matching(keys, values, keep_ratio=(target - 0.5) / 100, chunk_size=100, n_shared=4)
    chunks = [array.unflatten(1, (-1, 100)) for array in (keys, values)]

    def labels(settings):
        made = cluster_distinctive(*chunks, tuple(chunks), target, settings)
        return (made + target * torch.arange(TOKENS // 100)[:, None]).flatten(1)

    assert torch.equal(labels(Settings()), expected.labels)
    for wrong in ({"window": 5}, {"are_heads_together": False}, {"parts": ("keys",)}):
        if target > 1:
            assert not torch.equal(labels(replace(Settings(), **wrong)), expected.labels), wrong
    if target > 3:
        assert not torch.equal(labels(replace(Settings(), n_shared=1)), expected.labels)


def test_default_variant_stores_what_the_cache_stores(case):
    from benchmarks.ablation.variants import Settings, compress_layer

    model = long_llama()
    context, full = context_of(model, case)
    sizes = {"chunk_size": 64, "n_recent": 20, "n_shared": 4}  # nine whole chunks between 4 sinks and 20 recent tokens
    cache = fill(ClusteredCache.for_model(model, keep_ratio=10 / 64, n_sink=4, chunk_size=64, n_recent=20), full)
    for layer, (keys, values) in zip(cache.layers, context.read, strict=True):
        made = compress_layer(keys, values, 10, replace(Settings(), **sizes))
        assert torch.equal(made.counts.int(), layer.cache.caches[0].counts[0])
        assert torch.equal(made.keys, layer.cache.caches[0].keys[0])
        assert torch.equal(made.values, layer.cache.caches[0].values[0])
        wrong = compress_layer(keys, values, 10, replace(Settings(), **sizes | {"n_shared": 3}))
        assert not torch.equal(wrong.keys, made.keys)


def test_every_variant_keeps_to_its_budget_and_loses_no_token_unless_it_evicts():
    from benchmarks.ablation.variants import PANELS, Settings, alike, compress_layers, describe

    keys, values = (torch.cat(arrays(seed) * 2, dim=1)[:, :2000] for seed in (0, 1))
    default = {}
    for variants in PANELS.values():
        for settings in variants.values():
            [held] = compress_layers([(keys, values)], 0.3, replace(settings, share_out=alike))
            assert held.counts.shape[1] <= 0.3 * 2000
            assert held.counts.shape[1] > 0.28 * 2000
            assert (held.counts.sum(dim=-1) == 2000).all() == (settings.n_shared > 0), describe(settings)
            default[describe(replace(settings, share_out=alike))] = held.keys
    usual = default.pop(describe(replace(Settings(), share_out=alike)))
    assert not any(torch.equal(keys, usual) for keys in default.values())


def test_packed_scores_are_those_of_the_evaluation(case):
    """One row for all questions gives what each question on a copy of the cache gives; without counts it does not."""
    from benchmarks.ablation.packed_scoring import Held, exact, score
    from benchmarks.ablation.packed_scoring import following_nll as packed_nll

    model = long_llama()
    context, full = context_of(model, case)
    cache = fill(ClusteredCache.for_model(model, keep_ratio=0.1), full)
    clustered = [
        Held(*(x[0] for x in (e.keys, e.values, e.counts))) for e in (layer.cache.caches[0] for layer in cache.layers)
    ]
    for held, theirs in ((exact(context.read), full), (clustered, cache)):
        expected = score_needles(model, theirs, case.needles, nbytes=1)
        found = score(model, case, held)
        assert [each.is_right for each in found] == [each.is_right for each in expected]
        for ours, of_evaluation in zip(found, expected, strict=True):
            assert equal_in_float32(np.float32(ours.nll), np.float32(of_evaluation.nll))
        nll = np.float32(following_nll(model, theirs, case.following))
        assert equal_in_float32(np.float32(packed_nll(model, case, held)), nll)
    uncounted = [Held(each.keys, each.values, torch.ones_like(each.counts)) for each in clustered]
    assert not equal_in_float32(np.float32(packed_nll(model, case, uncounted)), nll)


def test_mass_on_needles_is_the_attention_of_the_model(case):
    from benchmarks.ablation.reading_layers import needle_mass

    model = long_llama(attention="eager")
    context, _ = context_of(model, case)
    found, nll = needle_mass(model, context)
    expected, n_queries = torch.zeros(len(context.read)), sum(len(needle.answer) for needle in case.needles)
    for needle in case.needles:
        asked = needle.question + needle.answer
        start = round(needle.depth * TOKENS)
        with torch.inference_mode():
            weights = model(torch.tensor([case.tokens + asked[:-1]]), output_attentions=True).attentions
        for layer, each in enumerate(weights):
            rows = each[0, :, -len(needle.answer) :]  # (heads, rows, tokens)
            expected[layer] += rows[..., start : start + len(asked)].sum() / n_queries
    assert len(nll) == n_queries
    assert equal_in_float32(found.numpy(), expected.numpy())
    assert not equal_in_float32(found.numpy(), expected.flip(0).numpy())


@pytest.mark.slow
def test_script_finds_layers_of_any_llama(tmp_path, monkeypatch):
    """The whole of it on a tiny model; what was read once is read from its file, which has the bits of the model."""
    from benchmarks.ablation import packed_scoring, reading_layers

    monkeypatch.setattr(packed_scoring, "CACHED", tmp_path / "contexts")
    folder = save_character_llama(tmp_path / "model")
    sizes = ["--contexts", "2", "--needles", "3", "--tokens", "700", "--candidates", "3", "--reading", "2"]
    found = []
    for number in range(2):
        files = ["--json", str(tmp_path / f"{number}.json"), "--figure", str(tmp_path / "layers.png")]
        monkeypatch.setattr("sys.argv", ["reading_layers.py", "--model", str(folder), *sizes, *files])
        reading_layers.main()
        found.append(json.loads((tmp_path / f"{number}.json").read_text()))
    assert found[0] == found[1]
    assert len(list((tmp_path / "contexts").iterdir())) == 2
    assert sorted(found[0]["without"]) == ["0", "1", "2"]
    assert len(found[0]["reading_layers"]) == 2
    assert (tmp_path / "layers.png").stat().st_size > 10_000


def test_results_are_of_all_contexts_and_differences_of_the_same_ones(tmp_path):
    """Made-up runs: a row that misses a context is left out; what all contexts lose alike has no interval's width."""
    from benchmarks.ablation.figure import draw
    from benchmarks.ablation.run import SETTINGS, SHIPPED, collect, table_of

    runs = []
    for case in range(4):
        for name in ("full", SHIPPED, *SETTINGS):
            key = {"kind": "digits", "variant": name, "keep": 1.0 if name == "full" else 0.2, "case": str(case)}
            right = 7 - (name != "full") - (name == "window=1")
            sums = {"n": 2, "tokens": 14, "right": right + case, "exact": int(right == 7), "nll": 3.0}
            runs.append({"key": key | {"part": "needles"}, "stored": stored_sums([10]), "needles": sums})
            if case == 0:
                runs.append({"key": key | {"part": "times"}, "seconds": 2.0 if name == "window=3" else 1.0})
            if name != "n_shared=1":
                runs.append({"key": key | {"part": "following"}, "following": {"n": 10, "nll": 5.0 + (name != "full")}})
    runs = [each for each in runs if each["key"]["variant"] != "n_recent=64" or each["key"]["case"] != "3"]
    results = collect(runs, "digits")
    assert ("n_recent=64", 0.2) not in results
    difference = results["window=1", 0.2]["difference"]
    assert numbers_agree([difference[name] for name in ("value", "low", "high")], [-1 / 14] * 3)
    assert results["window=1", 0.2]["accuracy"]["low"] < results["window=1", 0.2]["accuracy"]["value"]
    assert results["window=3", 0.2]["time"] == 2.0
    assert numbers_agree([results["window=3", 0.2]["perplexity"]["value"]], [np.exp(0.1)])
    assert results["n_shared=1", 0.2]["perplexity"] is None
    assert table_of(results, [0.2]).row_count > len(SETTINGS)
    draw(tmp_path / "ablation.png", results, [0.2])
    assert (tmp_path / "ablation.png").stat().st_size > 10_000
