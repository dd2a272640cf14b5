"""The report of a cache says what its layers hold, and its picture shows it."""

import io
import json

import pytest
import torch
from models import greedy, random_tokens, tiny_llama
from rich.console import Console

from kvcluster.fast import SoftMatching
from kvcluster.fast.huggingface import ChelseaCache, ClusteredCache, RecallCache

CLUSTERED = {"keep_ratio": 0.25, "chunk_size": 16, "n_sink": 2, "n_recent": 8, "method": SoftMatching()}
COMPRESSED = {"ratio": 0.25, "max_new_tokens": 20, "interval": 4, "chunk_size": 16, "n_sink": 2, "n_recent": 8}
RECALLED = {"budget": 40, "n_sink": 4, "tokens_per_cluster": 4, "segment_size": 16, "prompt_segment_size": 32}


def filled(cache_class, model, **parameters):
    cache = cache_class.for_model(model, **parameters)
    greedy(model, random_tokens(150, batch=2), n_new=20, past_key_values=cache)
    return cache


def test_a_clustered_cache_is_reported_layer_by_layer():
    cache = filled(ClusteredCache, tiny_llama(), **CLUSTERED)
    report = cache.report().as_dict()
    entries = [layer.cache.caches[0] for layer in cache.layers]
    assert report["n_seen"] == cache.n_seen == 169
    assert report["nbytes"] == cache.nbytes == sum(one.nbytes for one in entries)
    assert report["ratio"] == entries[0].n_stored / 169
    assert json.loads(json.dumps(report)) == report
    for layer, one in zip(report["layers"], entries, strict=True):
        assert (layer["kind"], layer["n_stored"], layer["hit_rate"]) == ("clustered", one.n_stored, None)
        chunks = one.n_clustered // 16
        assert one.work.n_rows == chunks * 2 * 2 * (8 + 4)  # batch and KV heads; sources of two rounds
        assert layer["rescored"] == one.work.n_scored_rows / one.work.n_rows
        assert layer["seconds"] > 0


def test_kinds_and_hit_rates_of_a_recall_cache(tmp_path):
    options = {"n_dense_layers": 1, "offloading": True, "folder": tmp_path, "n_steps": 2}
    cache = filled(RecallCache, tiny_llama(), **RECALLED, **options)
    layers = cache.report().as_dict()["layers"]
    assert [layer["kind"] for layer in layers] == ["dense", "recalled", "recalled"]
    assert [layer["hit_rate"] is None for layer in layers] == [True, False, False]
    assert layers[1]["hit_rate"] == cache.layers[1].cache.caches[0].statistics.hit_rate
    assert layers[0]["rescored"] is None
    assert layers[1]["ratio"] == 1


def test_the_table_shows_every_layer_and_the_totals():
    cache = filled(ClusteredCache, tiny_llama(), **CLUSTERED)
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(cache.report())
    text = console.export_text()
    assert f"{cache.nbytes:,}" in text
    assert text.count("clustered") == 3
    empty = ClusteredCache.for_model(tiny_llama(), **CLUSTERED)
    console.print(empty.report())
    assert "Cache of 0 tokens" in console.export_text()


@pytest.mark.parametrize(("cache_class", "parameters"), [(ClusteredCache, CLUSTERED), (RecallCache, RECALLED)])
def test_the_picture_has_a_line_for_each_layer_and_head(cache_class, parameters):
    model = tiny_llama()
    cache = filled(cache_class, model, **parameters)
    axes = cache.plot(row=1).axes[0]
    image = torch.from_numpy(axes.images[0].get_array().filled(float("nan")))
    assert len(image) == 3 * 2
    entries = cache.layers[2].cache.caches[0]
    counts = entries.counts if cache_class is ClusteredCache else entries.clusters.counts
    assert image[5].nan_to_num().max() == counts[1, 1].max()
    with pytest.raises(ValueError, match="row must be from 0 to 1, got 2"):
        cache.plot(row=2)
    with pytest.raises(ValueError, match="plot needs something clustered"):
        cache_class.for_model(model, **parameters).plot()


def test_the_picture_of_a_budget_is_as_wide_as_the_tokens():
    """A pixel stays a chunk where several chunks became one span."""
    cache = filled(ClusteredCache, tiny_llama(), **CLUSTERED | {"budget": 40})
    entries = cache.layers[0].cache.caches[0]
    assert len(entries.spans) < sum(entries.spans)
    image = cache.plot().axes[0].images[0].get_array()
    assert image.shape == (6, entries.n_clustered // entries.chunk_size)


@pytest.mark.parametrize(("cache_class", "parameters"), [(ClusteredCache, CLUSTERED), (ChelseaCache, COMPRESSED)])
def test_whole_heads_keep_their_place_in_the_picture(cache_class, parameters):
    cache = filled(cache_class, tiny_llama(), **parameters, whole_heads=[(1, 0), (2, 0), (2, 1)])
    report = cache.report().as_dict()["layers"]
    assert [layer["n_stored"] for layer in report] == [x.cache.caches[0].mean_entries for x in cache.layers]
    axes = cache.plot(row=1).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0.0", "0.1", "1.0", "1.1", "2.0", "2.1"]
    image = axes.images[0].get_array()
    assert (image.max(axis=1) > 1).tolist() == [True, True, False, True, False, False]
    entries = cache.layers[1].cache.caches[0]
    assert image[3].max() == entries.counts[1, 0].max()
    n_recent = 8 if cache_class is ChelseaCache else entries.n_seen - 2 - entries.n_clustered
    assert image.shape[1] == -(-(entries.n_seen - 2 - n_recent) // 16)


def test_chunks_that_keep_every_token_are_in_the_picture():
    image = filled(ClusteredCache, tiny_llama(), **CLUSTERED | {"keep_ratio": 1}).plot().axes[0].images[0].get_array()
    assert image.shape[0] == 6
    assert (image == 1).all()
