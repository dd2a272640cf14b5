"""The claims M1 to M5 of theory/merging hold, and their checks fail for false ones."""

import dataclasses

import numpy as np
import pytest
from agreement import at_most_in_float64

from kvcluster.reference import Clustering, attention, clustered_attention, merge
from kvcluster.theory.merging import certified
from kvcluster.theory.merging import checks as merging
from kvcluster.theory.merging.certificate import Radii, certificate, largest_quotient, radii
from kvcluster.theory.merging.rounding import attention_rounding, lengths


@pytest.mark.parametrize(
    "check",
    [
        merging.check_equal_keys,
        merging.check_jensen,
        merging.check_gap,
        merging.check_pair,
        certified.check_certificate,
    ],
    ids=lambda check: check.__name__.removeprefix("check_"),
)
def test_claim_holds(check):
    result = check()
    assert result.holds, result


def test_n1_rounding_covers_attention_and_a_ten_thousandth_of_it_does_not():
    """The longest floats that this machine has, as a judge of float64."""
    rng = np.random.default_rng(1)
    query, keys, values = (rng.standard_normal((n, 64)).astype(np.float32) * 3 for n in (5, 200, 200))
    logits = (query.astype(np.longdouble) @ keys.T.astype(np.longdouble)) * np.longdouble(0.125)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    exact = weights @ values.astype(np.longdouble) / weights.sum(axis=-1, keepdims=True)
    error = lengths((attention(query, keys, values, scale=0.125) - exact).astype(np.float64))
    allowed = attention_rounding(query, keys, values, scale=0.125)
    assert (error <= allowed).all()
    assert not (error <= allowed / 10_000).all()


def test_m1_is_false_without_log_counts():
    assert not merging.check_equal_keys(np.ones_like).holds


@pytest.mark.parametrize("representative", [lambda logits: logits.max(axis=-1), lambda logits: logits[:, 0]])
def test_m2_is_false_for_another_representative(representative):
    assert not merging.check_jensen(representative).holds


@pytest.mark.parametrize("side", [0, 1])
def test_m3_is_false_for_exactly_half_of_the_variance(side):
    def bounds(logits):
        found = list(merging.gap_bounds(logits))
        found[side] = logits.var(axis=-1) / 2
        return tuple(found)

    assert not merging.check_gap(bounds).holds


def test_m4_is_false_without_its_denominator_and_for_another_function():
    def without_denominator(share, logits, values, output):
        surplus = np.cosh((logits[:, 0] - logits[:, 1]) / 2) - 1
        return merging.error_of_pair(share, logits, values, output) * (1 + share * surplus)[:, None]

    def with_tanh(share, logits, values, output):
        half = np.arcsinh(np.tanh((logits[:, 0] - logits[:, 1]) / 2))
        return merging.error_of_pair(share, np.stack([half, -half], axis=1), values, output)

    assert not merging.check_pair(without_denominator).holds
    assert not merging.check_pair(with_tanh).holds


def test_m4_is_false_for_a_first_order_of_keys_alone():
    def keys_alone(share, logits, values):
        return share[:, None] * (logits[:, 0] - logits[:, 1])[:, None] * np.ones_like(values[:, 0])

    assert not merging.check_pair(leading=keys_alone).holds


def scaled(**factors):
    """The radii of a cache that remembers them wrongly."""

    def measure(*args):
        found = radii(*args)
        return dataclasses.replace(found, **{name: factor * getattr(found, name) for name, factor in factors.items()})

    return measure


@pytest.mark.slow
@pytest.mark.parametrize(
    "factors",
    [{"keys": 0.5}, {"values": 0.5}, {"values": 0}, {"key_shifts": 0, "value_shifts": 0}],
    ids=["half-key-radius", "half-value-radius", "no-value-radius", "no-shifts"],
)
def test_m5_is_false_for_smaller_radii(factors):
    assert not certified.check_certificate(measure=scaled(**factors)).holds


def test_m5_is_false_without_the_bound_of_mass():
    """As if merging moved values inside of clusters only, and no weight between them."""

    def values_only(query, keys, values, counts, held, *, scale):
        nearer = dataclasses.replace(held, keys=0 * held.keys, value_shifts=held.values)
        return certificate(query, keys, values, counts, nearer, scale=scale)

    assert not certified.check_certificate(values_only).holds


def test_m5_of_two_tokens_is_met_to_first_order():
    """A query along the difference of the only two tokens: sinh and tanh by hand."""
    keys = np.array([[1.0], [-1.0]], dtype=np.float32)
    clustering = Clustering(np.array([0, 0]), np.array([2]))
    query = np.array([[1e-3], [2.0]], dtype=np.float32)
    stored = merge(keys, clustering), merge(keys, clustering), clustering.counts
    held = radii(keys, keys, clustering, *stored[:2])
    error = lengths(attention(query, keys, keys, scale=1.0) - clustered_attention(query, *stored, scale=1.0))
    bound = certificate(query, *stored, held, scale=1.0)
    assert error[0] <= bound[0] <= error[0] * 1.00001
    assert error[1] <= bound[1] <= 1.0001  # tanh(2) of at most the value radius


def test_m5_is_nothing_for_tokens_alone():
    keys = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32)
    none = np.zeros(5)
    bound = certificate(keys, keys, keys, np.ones(5, dtype=int), Radii(none, none, none, none), scale=1.0)
    assert (bound == 0).all()


def test_largest_quotient_is_the_best_of_all_corners():
    rng = np.random.default_rng(2)
    for _ in range(20):
        weights, away, within = rng.random((3, 6))
        low, high = rng.uniform(0.3, 1, 6), rng.uniform(1, 9, 6)
        corners = np.where(np.arange(64)[:, None] >> np.arange(6) & 1, high, low)
        quotients = (weights * (np.abs(corners - 1) * away + corners * within)).sum(1) / (weights * corners).sum(1)
        found = largest_quotient(weights, away, within, low, high)
        assert at_most_in_float64(quotients.max(), found)
        assert at_most_in_float64(found, quotients.max())


def test_random_trials_are_a_hundred_thousand():
    assert sum(trial.query.shape[0] * trial.query.shape[1] for trial in certified.random_trials()) == 100_000


def test_m5_holds_in_every_layer_of_real_models(real_model, monkeypatch):
    result = certified.check_certificate_on_real_keys(model=real_model)
    assert result.holds, result
    heads = {"smollm2": 30 * 9, "gemma3-270m": 3 * 4}[real_model]  # of all layers that attend to everything
    assert result.cases == len(certified.KEEP_RATIOS) * heads * 16
    monkeypatch.setattr(certified, "KEEP_RATIOS", (0.25,))
    assert not certified.check_certificate_on_real_keys(
        lambda *args, **kwargs: certificate(*args, **kwargs) / 1e4, model=real_model
    ).holds
