"""The claims P1 to P8 of theory/partition hold, and their checks fail for false ones."""

import numpy as np
import pytest
from agreement import equal_in_float64

from kvcluster.reference import alternating_partition
from kvcluster.reference.soft_matching import match_round
from kvcluster.theory.partition import checks as partition
from kvcluster.theory.partition import optimal, stationary
from kvcluster.theory.partition.optimal import all_clusterings, assignment


@pytest.mark.parametrize(
    "check",
    [
        partition.check_alternating,
        partition.check_optimal_set,
        partition.check_nearest_neighbours,
        partition.check_counterexamples,
        stationary.check_expected_cosine,
        optimal.check_optimal_matching,
        optimal.check_optimal_clustering,
        pytest.param(stationary.check_expected_partition, marks=pytest.mark.slow),
    ],
    ids=lambda check: check.__name__.removeprefix("check_"),
)
def test_claim_holds(check):
    result = check()
    assert result.holds, result


def halves(size):
    """The first half as sources."""
    return np.arange(-(-size // 2)), np.arange(-(-size // 2), size)


def abba(size):
    """Source, two destinations, source; as many sources as the alternating partition has."""
    order = sorted(range(size), key=lambda token: (token % 4 in (1, 2), token))
    sources = np.sort(order[: -(-size // 2)])
    return sources, np.setdiff1d(np.arange(size), sources)


def test_distances_and_half_gaps_of_seven_tokens():
    """Sources 0, 1, 3, 4, 5: a gap of two at the end, one of three between the destinations 2 and 6."""
    is_source = np.array([[True, True, False, True, True, True, False]])
    assert partition.distances(is_source).tolist() == [[2, 1, 0, 1, 2, 1, 0]]
    assert [found.tolist() for found in partition.half_gaps(is_source)] == [[0], [2]]


def test_every_partition_is_tried():
    assert len(partition.all_partitions(16)) == 2**16 - 1
    assert len(np.unique(partition.all_partitions(10), axis=0)) == 2**10 - 1


def test_p1_is_false_for_halves():
    assert not partition.check_alternating(halves).holds


def test_p1_is_false_if_destinations_served_one_side():
    assert not partition.check_alternating(largest=lambda b, m, threshold: min(m, b * threshold)).holds


def test_p2_is_false_for_runs_of_two_and_for_one_optimum():
    assert not partition.check_optimal_set(lambda smallest, largest, drops: largest <= 1).holds
    assert not partition.check_optimal_set(n_optimal=lambda m, b: 1).holds


def test_p2_counts_abba_among_the_optimal():
    for split in (alternating_partition, abba):
        is_source = np.isin(np.arange(16), split(16)[0])[None]
        smallest, largest = partition.half_gaps(is_source)
        assert partition.is_optimal_partition(smallest, largest, list(range(1, 15))).all()


def test_p3_is_false_for_halves():
    assert not partition.check_nearest_neighbours(halves).holds
    assert not partition.check_counterexamples(halves).holds


def test_p4_is_false_for_the_correlation_itself():
    assert not stationary.check_expected_cosine(lambda correlation, dim: correlation).holds


def test_p4_in_one_dimension_is_the_law_of_signs():
    """With one feature the cosine is the product of two signs, whose mean is an arcsine."""
    found = np.array([stationary.expected_cosine(0.5, 1)])
    assert equal_in_float64(found, np.array([2 / np.pi * np.arcsin(0.5)]))


@pytest.mark.slow
def test_p5_is_false_for_abba():
    assert not stationary.check_expected_partition(abba).holds


def match_one_to_one(keys, n_merged):
    """A round in which no two sources share a destination: the first that comes takes it."""
    sources, destinations = alternating_partition(len(keys))
    labels = np.arange(len(keys))
    labels[sources[:n_merged]] = destinations[:n_merged]
    return np.unique(labels, return_inverse=True)[1]


def match_the_least_alike(keys, n_merged):
    return match_round(np.where(np.arange(len(keys))[:, None] % 2, -keys, keys), n_merged)


@pytest.mark.parametrize("match", [match_one_to_one, match_the_least_alike])
def test_p6_is_false_for_another_matching(match):
    assert not optimal.check_optimal_matching(match).holds


def test_p6_assignment_of_two_sources_that_want_the_same():
    assert assignment(np.array([[5.0, 1.0], [4.0, 3.0]])) == 8


def test_p6_all_clusterings_are_those_of_stirling():
    assert [len(all_clusterings(8, clusters)) for clusters in (2, 4)] == [127, 1701]


def test_p6_is_false_if_some_clusterings_are_left_out(monkeypatch):
    monkeypatch.setattr(optimal, "all_clusterings", lambda tokens, clusters: all_clusterings(tokens, clusters)[:20])
    assert not optimal.check_optimal_clustering().holds


def test_p7_and_p8_hold_in_real_models_and_not_for_other_partitions(real_model):
    for check in (optimal.check_real_keys, optimal.check_chunks_and_rounds):
        assert check(model=real_model).holds
    assert not optimal.check_real_keys(halves, model=real_model).holds
    assert not optimal.check_chunks_and_rounds(chunk_sizes=(64, 16), model=real_model).holds
    assert not optimal.check_chunks_and_rounds(chunk_sizes=(64,), most=(2, 64), model=real_model).holds
