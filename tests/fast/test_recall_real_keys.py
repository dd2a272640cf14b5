"""Recall on real models' keys: the reference's clusters and tokens, on every backend, and a wrong one differs."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from agreement import assert_same_bits, attention_agrees
from inputs import to_torch

from kvcluster import fast, reference
from kvcluster.fast.cpu import recall as cpp
from kvcluster.fast.exact.scores import make_probe
from kvcluster.theory.real_cache import real_cache

PARAMETERS = {"budget": 128, "prompt_segment_size": 256}


@pytest.mark.parametrize("backend", ["torch", "cpp"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_every_layer_has_the_references_clusters_and_tokens(dtype, backend, real_model):
    held = real_cache(real_model)
    for layer in range(len(held.keys)):
        keys, values, queries = (x[layer].astype(dtype) for x in (held.keys, held.values, held.queries))
        expected, ours = reference.RecallCache(**PARAMETERS), fast.RecallCache(**PARAMETERS, backend=backend)
        expected.append(keys, values)
        ours.append(to_torch(keys), to_torch(values))
        for name in ("labels", "counts", "centroids"):
            assert_same_bits(getattr(ours.clusters, name), getattr(expected.clusters, name))
        for one in range(0, queries.shape[1], 8):
            query = queries[:, one : one + 3]
            chosen = expected.select_clusters(query)
            assert_same_bits(ours.select_clusters(to_torch(query)).taken, chosen.taken)
        entries = map(to_torch, expected.entries(chosen))
        assert attention_agrees(ours.attend(to_torch(query)), to_torch(query), *entries)


@pytest.mark.slow
def test_a_wrong_twin_of_the_selection_in_cpp_is_told_apart():
    """With a lead that is too small, exact ties are settled by float32."""
    rng = np.random.default_rng(0)
    one = to_torch(rng.standard_normal(64).astype(np.float32)).bfloat16().float().numpy()
    centroids = rng.permuted(np.tile(one, (6, 400, 1)), axis=-1)  # all tie exactly for a query of equal numbers
    deviations = np.zeros_like(centroids)
    query = np.full((6, 3, 64), 0.1, dtype=np.float32)
    counts = np.full((6, 400), 3)
    expected = reference.select_clusters(query, centroids, counts, budget=301, deviations=deviations).taken
    features = torch.from_numpy(np.concatenate([centroids, deviations], axis=-1))
    scored = fast.exact.scores.score_clusters(features, torch.from_numpy(counts))
    probe = make_probe(torch.from_numpy(query), 0.5)

    def taken(largest):
        clusters = replace(scored, features=features.bfloat16(), largest=largest)
        return cpp.take(probe, clusters, torch.from_numpy(counts), 301).numpy()

    assert np.array_equal(taken(scored.largest), expected)
    assert not np.array_equal(taken(torch.full_like(scored.largest, 2.0**-39)), expected)
