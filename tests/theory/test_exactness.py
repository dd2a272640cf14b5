"""The checks of theory/exactness/checks.py hold, and each one fails for a false variant of its claim."""

import numpy as np
import pytest
import torch
from products import prefer_the_last

from kvcluster import fast
from kvcluster.fast.exact import mean as exact_mean
from kvcluster.fast.exact import similarity as exact_similarity
from kvcluster.fast.exact.scores import approximate_scores
from kvcluster.fast.plain import kmeans, selection
from kvcluster.reference.similarity import halving_sum
from kvcluster.theory.exactness import checks as exactness
from kvcluster.theory.exactness import recalling

CHECKS = [(module, name) for module in (exactness, recalling) for name in module.__all__ if name.startswith("check_")]


@pytest.mark.parametrize(("module", "name"), CHECKS, ids=[name for _, name in CHECKS])
def test_claim_holds(module, name):
    result = getattr(module, name)()
    assert result.holds, result


def test_e1_is_false_for_float64():
    assert not exactness.check_products(np.float64).holds


def in_order(terms):
    return np.add.accumulate(terms, axis=-1)[..., -1]


def neighbours_first(terms):
    while terms.shape[-1] > 1:
        terms = np.pad(terms, ((0, 0), (0, terms.shape[-1] % 2)))
        terms = terms[..., 0::2] + terms[..., 1::2]
    return terms[..., 0]


@pytest.mark.parametrize("other", [in_order, neighbours_first])
def test_e2_is_false_for_another_order(other):
    """Next to 1 a tiny term is lost, next to another one it is not."""
    example = np.array([[1, 2.0**-53, 0, 2.0**-53]])
    assert other(example)[0] == 1 < halving_sum(example)[0]
    assert not exactness.check_halving_sum(other).holds


def similarity_in_float32(a, b):
    (a, _), (b, _) = (exact_similarity.normalized(torch.from_numpy(keys)) for keys in (a, b))
    cosine = (a @ b.mT).double().numpy()
    return cosine * np.abs(cosine)


def test_e3_is_false_in_float32():
    assert not exactness.check_bits_of_similarity(similarity_in_float32).holds
    assert not exactness.check_order_of_similarity(similarity_in_float32).holds


def test_e3_needs_gradual_underflow_of_the_quotient_only():
    """Of 2**-1104 it is zero on every machine, of 2**-1054 only where subnormals are flushed."""
    for low, expected in ((2.0**-149, 0.0), (2.0**-124, 2.0**-1054)):
        a, b = (torch.tensor([x]) for x in ([2.0**127, 2.0**-149, 0], [0, low, 2.0**127]))
        assert fast.similarity(a, b).item() == expected


def test_e4_is_false_with_an_error_that_does_not_grow_with_dim():
    assert not exactness.check_filter(lambda dim: 27 * exactness.U).holds


def test_e4_is_false_with_half_of_the_margin():
    assert not exactness.check_margin(lambda dim, unit: exact_similarity.margin(dim, unit) / 2).holds
    assert not exactness.check_margin(lambda dim, unit: (4 * dim + 36) * unit).holds


def test_e4_and_e7_are_false_without_margin(monkeypatch):
    prefer_the_last(monkeypatch)
    assert exactness.check_matches().holds
    assert exactness.check_decisions().holds
    monkeypatch.setattr(exact_similarity, "margin", lambda dim, unit: 0.0)
    assert not exactness.check_matches().holds
    assert not exactness.check_decisions().holds


def cut_by_the_filter(matches, sources, destinations, n_top):
    return matches.cosine.argsort(dim=-1, descending=True, stable=True)[:, :n_top]


def cut_with_ties_to_the_last(matches, sources, destinations, n_top):
    best = fast.similarity(sources, destinations).amax(dim=-1)
    return best.shape[1] - 1 - best.flip(1).argsort(dim=-1, descending=True, stable=True)[:, :n_top]


@pytest.mark.parametrize("top", [cut_by_the_filter, cut_with_ties_to_the_last])
def test_e5_is_false_for_another_cut(top):
    assert not exactness.check_cut(top).holds


def condition(factor, is_signed):
    """`sums_are_exact` with another factor, and with or without its care for the sign of zeros."""

    def is_exact(chunks):
        sizes = chunks.abs().double()
        smallest = torch.where(sizes == 0, torch.inf, sizes).amin(dim=(1, 2))
        has_negative_zero = ((chunks == 0) & chunks.signbit()).any(dim=2).any(dim=1)
        is_narrow = chunks.shape[1] * sizes.amax(dim=(1, 2)) <= factor * smallest
        return is_narrow & ~has_negative_zero if is_signed else is_narrow

    return is_exact


def test_e6_needs_its_condition():
    tokens = torch.tensor([[[1.0], [1e30], [-1e30]]])
    assert not bool(exact_mean.sums_are_exact(tokens)[0])
    assert (tokens.double()[0, [0, 1, 2]].cumsum(0)[-1], tokens.double()[0, [1, 2, 0]].cumsum(0)[-1]) == (0, 1)
    assert exactness.check_sums(condition(2.0**29, is_signed=True)).holds
    assert not exactness.check_sums(condition(2.0**30, is_signed=True)).holds
    assert not exactness.check_sums(condition(2.0**29, is_signed=False)).holds


def test_e8_is_false_for_ties_to_the_last(monkeypatch):
    right = kmeans.assign

    def last(keys, unit_keys, is_safe, centroids):
        labels, n_scored = right(keys, unit_keys, is_safe, centroids.flip(1))
        return centroids.shape[1] - 1 - labels, n_scored

    monkeypatch.setattr(kmeans, "assign", last)
    assert not recalling.check_kmeans().holds


def test_e9_is_false_without_a_lead(monkeypatch):
    def without(probe, clusters):
        scores, lead = approximate_scores(probe, clusters)
        return scores, torch.zeros_like(lead)

    prefer_the_last(monkeypatch)
    assert recalling.check_lead().holds
    assert recalling.check_selection().holds
    assert not recalling.check_lead(without).holds
    monkeypatch.setattr(selection, "approximate_scores", without)
    assert not recalling.check_selection().holds
