"""Random sequences of all that can happen to a cache, against a plain list of the tokens that it must know.

The list holds, for each layer and row, the keys and values of real tokens that the layer was given. Whatever happened,
the cache must be, bit for bit, the reference's cache of that list.
"""

import copy
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from agreement import assert_same_bits
from caches import of_reference
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from inputs import slowly
from models import tiny_llama

from kvcluster import reference
from kvcluster.fast import Distinctive, SoftMatching
from kvcluster.fast.huggingface import ClusteredCache, RecallCache
from kvcluster.fast.huggingface.layers import EntryLayer

CLUSTERED = {"chunk_size": 8, "n_sink": 2, "n_recent": 3, "method": SoftMatching()}
RECALL = {"budget": 24, "n_sink": 2, "n_recent": 2, "tokens_per_cluster": 4, "prompt_segment_size": 16}
LAYERS = 2
KINDS = {
    "clustered": (ClusteredCache, CLUSTERED | {"keep_ratio": 0.25}),
    "whole": (ClusteredCache, CLUSTERED | {"keep_ratio": 1}),
    "budget": (ClusteredCache, CLUSTERED | {"keep_ratio": 0.5, "budget": 30}),
    "distinctive": (ClusteredCache, CLUSTERED | {"keep_ratio": 0.5, "method": Distinctive(n_shared=2)}),
    "ragged": (ClusteredCache, CLUSTERED | {"keep_ratio": [[0.7, 0.3]] * LAYERS}),
    "ragged-distinctive": (
        ClusteredCache,
        CLUSTERED | {"keep_ratio": [[0.4, 1.0]] * LAYERS, "method": Distinctive(n_shared=2), "recent_share": 0.2},
    ),
    "bits": (ClusteredCache, CLUSTERED | {"keep_ratio": 0.7, "bits": 4}),
    "whole-bits": (ClusteredCache, CLUSTERED | {"keep_ratio": 1, "bits": (8, 3)}),
    "ragged-bits": (ClusteredCache, CLUSTERED | {"keep_ratio": [[0.7, 1.0]] * LAYERS, "bits": 2}),
    "recall": (RecallCache, RECALL),
    "offloaded": (RecallCache, RECALL | {"offloading": True}),
}
N_TOKENS = 97


class Known:
    """What a layer was given of each row: keys and values (kv_heads, tokens, dim), and how many tokens came first."""

    def __init__(self, padding):
        self.rows = [
            [[np.zeros((2, 0, 16), np.float32), np.zeros((2, 0, 16), np.float32), None] for _ in padding]
            for _ in range(LAYERS)
        ]
        self.padding = list(padding)
        self.seen = 0

    def take(self, layer, keys, values):
        n_new = keys.shape[2]
        seen = self.seen
        for row, held in enumerate(self.rows[layer]):
            real = slice(max(0, self.padding[row] - seen), None)
            for part, new in enumerate((keys, values)):
                held[part] = np.concatenate([held[part], new[row, :, real].numpy()], axis=1)
            if held[2] is None and held[0].shape[1]:
                held[2] = held[0].shape[1]
        if layer == LAYERS - 1:
            self.seen += n_new

    def select(self, rows):
        self.padding = [self.padding[row] for row in rows]
        self.rows = [[list(layer[row]) for row in rows] for layer in self.rows]

    def crop(self, n_tokens):
        self.seen -= n_tokens
        for row, size in enumerate(self.padding):
            left = max(0, self.seen - size)
            self.padding[row] = min(size, self.seen)
            for layer in self.rows:
                layer[row][:2] = [array[:, :left] for array in layer[row][:2]]
                layer[row][2] = min(layer[row][2] or 0, left) or None


def check(cache, known, kind):
    """The cache holds what the reference makes of the list."""
    made, parameters = kind
    parameters = {name: value for name, value in parameters.items() if name != "offloading"}
    assert cache.n_seen == known.seen
    assert (cache.padding or [0] * len(known.padding)) == [min(n, known.seen) for n in known.padding]
    for layer, rows in zip(cache.layers, known.rows, strict=True):
        for row, (keys, values, n_first) in enumerate(rows):
            entries, place = layer.cache.of_row(row)
            assert entries.n_seen == keys.shape[1]
            if not keys.shape[1]:
                continue
            expected = (reference.RecallCache if made is RecallCache else of_reference)(**parameters)
            if made is RecallCache:
                expected.append(keys[:, :n_first], values[:, :n_first])
                expected.append(keys[:, n_first:], values[:, n_first:])
                names = ["keys", "values"]
                assert (entries.clusters is None) == (expected.clusters is None)
                if expected.clusters is not None:
                    assert_same_bits(entries.clusters.labels[place], expected.clusters.labels)
                    assert_same_bits(entries.clusters.centroids[place], expected.clusters.centroids)
            else:
                expected.append(keys, values)
            if made is RecallCache:
                ours, arrays = ([getattr(x, name) for name in names] for x in (entries, expected))
            else:
                ours, arrays = entries.entries(), expected.entries()
            for held, array in zip(ours, arrays, strict=True):
                assert_same_bits(held[place], np.ascontiguousarray(array))


def run(data, kind, model, monkeypatch):
    """A random sequence of operations."""
    made, parameters = kind
    cache, known, mask = made.for_model(model, **parameters), None, None
    given_to_layers = []
    update = EntryLayer.update

    def recording(layer, keys, values, *args, **kwargs):
        given_to_layers.append((keys.clone(), values.clone()))
        return update(layer, keys, values, *args, **kwargs)

    monkeypatch.setattr(EntryLayer, "update", recording)

    def tokens(n_tokens):
        shape = (len(known.padding), n_tokens)
        return torch.from_numpy(np.random.default_rng(known.seen).integers(0, N_TOKENS, shape))

    def feed(n_tokens):
        nonlocal mask, ids
        new = tokens(n_tokens)
        ids = torch.cat([ids, new], dim=1)
        mask = (torch.arange(ids.shape[1]) >= torch.tensor(all_padding)[:, None]).long()
        with torch.inference_mode():
            model(new, attention_mask=mask, past_key_values=cache)

    for _ in range(data.draw(st.integers(3, 8), label="operations")):
        if known is None:
            all_padding = data.draw(st.lists(st.sampled_from([0, 0, 5, 20]), min_size=1, max_size=3), label="padding")
            known, ids = Known(all_padding), torch.zeros(len(all_padding), 0, dtype=torch.long)
        name = data.draw(
            st.sampled_from(["feed", "feed", "feed", "generate", "crop", "select", "file", "copy", "reset"])
        )
        if known.seen < max(all_padding) and name in ("generate", "crop"):
            name = "feed"
        if name == "feed":
            feed(data.draw(st.integers(1, 60), label="tokens"))
        elif name == "generate":
            n_new = data.draw(st.integers(1, 12), label="new tokens")
            longer = torch.cat([ids, tokens(1)], dim=1)
            mask = (torch.arange(longer.shape[1]) >= torch.tensor(all_padding)[:, None]).long()
            out = model.generate(
                longer,
                attention_mask=mask,
                past_key_values=cache,
                max_new_tokens=n_new,
                do_sample=False,
                pad_token_id=0,
            )
            ids = out[:, :-1]
        elif name == "crop":
            most = cache.n_croppable
            n_tokens = min(data.draw(st.integers(0, 40), label="cropped"), known.seen - max(all_padding))
            if n_tokens > most:
                with pytest.raises(ValueError, match=f"crop must remove at most the {most} tokens"):
                    cache.crop(-n_tokens)
            elif n_tokens:  # crop(0) means another thing in older versions
                cache.crop(-n_tokens)
                known.crop(n_tokens)
                ids = ids[:, : ids.shape[1] - n_tokens]
        elif name == "select" and known.seen:
            rows = data.draw(st.lists(st.integers(0, len(all_padding) - 1), min_size=1, max_size=4), label="rows")
            cache.batch_select_indices(torch.tensor(rows))
            known.select(rows)
            all_padding, ids = [all_padding[row] for row in rows], ids[rows]
        elif name == "file":
            with tempfile.TemporaryDirectory() as folder:
                cache.save(Path(folder) / "cache")
                cache = made.load(
                    Path(folder) / "cache", model, **({"offloading": True} if "offloading" in parameters else {})
                )
        elif name == "copy":
            cache = copy.deepcopy(cache)
        elif name == "reset":
            cache.reset()
            known = None
            continue
        for number, (keys, values) in enumerate(given_to_layers):
            known.take(number % LAYERS, keys, values)
        given_to_layers.clear()
        check(cache, known, kind)


@pytest.mark.parametrize("name", [name if name in {"budget", "recall"} else slowly(name) for name in KINDS])
def test_random_operations_leave_what_the_reference_makes_of_the_tokens(name, monkeypatch):
    model = tiny_llama(layers=LAYERS)

    @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def any_sequence(data):
        with monkeypatch.context() as patch:
            run(data, KINDS[name], model, patch)

    any_sequence()


@pytest.mark.parametrize("broken", ["crop", "select"])
def test_an_operation_that_does_nothing_is_noticed(broken, monkeypatch):
    """The control: a cache that ignores a crop, or the order of rows, differs from the list."""
    model = tiny_llama(layers=LAYERS)
    cache = ClusteredCache.for_model(model, **KINDS["clustered"][1])
    known = Known([0, 0])
    update = EntryLayer.update

    def recording(layer, keys, values, *args, **kwargs):
        known.take(cache.layers.index(layer), keys, values)
        return update(layer, keys, values, *args, **kwargs)

    monkeypatch.setattr(EntryLayer, "update", recording)
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, N_TOKENS, (2, 31)))
    with torch.inference_mode():
        model(tokens, past_key_values=cache)
    check(cache, known, KINDS["clustered"])
    if broken == "crop":
        known.crop(1)
    else:
        known.select([1, 0])
    with pytest.raises(AssertionError):
        check(cache, known, KINDS["clustered"])
