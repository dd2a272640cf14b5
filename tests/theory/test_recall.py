"""The claims R1 to R4 of theory/recall hold, and their checks fail for false ones."""

import dataclasses

import numpy as np
import pytest

from kvcluster.reference.clustered_attention import log_counts
from kvcluster.theory.merging.certificate import certificate
from kvcluster.theory.recall import checks as recall


@pytest.mark.parametrize(
    "check",
    [recall.check_left_out, recall.check_mass, recall.check_stand_ins],
    ids=lambda check: check.__name__.removeprefix("check_"),
)
def test_claim_holds(check, real_model):
    result = check(model=real_model)
    assert result.holds, result


@pytest.mark.slow
def test_r4_holds():
    assert recall.check_greedy().holds


def test_the_real_model_is_among_the_recalls(real_model):
    assert {one.keys.shape[-2:] for one in recall.recalls(real_model)} == {
        (40, 8),
        (60, 16),
        (33, 2),
        (512, {"smollm2": 64, "gemma3-270m": 256}[real_model]),
    }


@pytest.mark.parametrize(
    "share",
    [lambda weights, taken: recall.left_out(weights, taken) ** 2, lambda *_: np.array([[1e-3]])],
    ids=["squared", "constant"],
)
def test_r1_is_false_for_another_mass(share, real_model):
    assert not recall.check_left_out(share, model=real_model).holds


def test_r2_is_false_without_radii(monkeypatch, real_model):
    monkeypatch.setattr(recall, "most_mass", lambda radius, shift: np.ones_like(radius))
    assert not recall.check_mass(model=real_model).holds


@pytest.mark.parametrize("forgotten", [("keys", "key_shifts"), ("values", "value_shifts")])
def test_r3_is_false_for_forgotten_radii(forgotten, real_model):
    def certify(query, keys, values, counts, held, *, scale):
        none = dict.fromkeys(forgotten, np.zeros_like(held.keys))
        return certificate(query, keys, values, counts, dataclasses.replace(held, **none), scale=scale)

    assert not recall.check_stand_ins(certify, model=real_model).holds


@pytest.mark.slow
def test_r4_is_false_for_scores_with_log_counts():
    def by_weight(query, centroids, counts, budget):
        order = np.argsort(-(query @ centroids.T + log_counts(counts))[0])
        taken, left = np.zeros_like(counts), budget
        for cluster in order:
            taken[cluster] = min(left, counts[cluster])
            left -= taken[cluster]
        return taken

    assert not recall.check_greedy(by_weight).holds
