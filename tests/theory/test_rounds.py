"""The claims P9 to P12 of theory/partition hold, and their checks fail for false ones."""

from fractions import Fraction

import numpy as np
import pytest

from kvcluster.reference import alternating_partition
from kvcluster.reference.pooled_matching import pooled_round
from kvcluster.theory.partition import convexity, pooled, rounds


@pytest.mark.parametrize(
    "check",
    [
        convexity.check_nearest_is_enough,
        convexity.check_convex_optima,
        convexity.check_all_pairs,
        convexity.check_four_tokens,
        convexity.check_moving_windows,
        pooled.check_pooled_cut,
        pooled.check_pooled_partitions,
        pooled.check_unlike_chunks,
        pooled.check_oldest_first,
        rounds.check_least_spread,
        rounds.check_first_step,
        rounds.check_runs,
        pytest.param(rounds.check_rounds, marks=pytest.mark.slow),
    ],
    ids=lambda check: check.__name__.removeprefix("check_"),
)
def test_claim_holds(check):
    result = check()
    assert result.holds, result


def halves(size):
    """The first half as sources."""
    return np.arange(-(-size // 2)), np.arange(-(-size // 2), size)


def test_convex_similarities_obey_the_condition_and_thresholds_do_not():
    assert all(convexity.is_convex(f) for f in convexity.convex_similarities(9))
    assert [convexity.is_convex(f) for f in convexity.thresholds(5)] == [True, False, False, True]


def test_p9_is_false_for_halves_and_where_neighbours_are_not_the_most_similar():
    assert not convexity.check_nearest_is_enough(halves).holds
    assert not convexity.check_nearest_is_enough(family=lambda tokens: [np.arange(tokens)]).holds


def test_p9_is_false_without_convexity_for_the_set_of_optima():
    assert not convexity.check_convex_optima(convexity.thresholds).holds


def test_p10_is_false_for_halves_and_for_similarities_that_only_fall():
    assert not convexity.check_all_pairs(halves).holds
    assert not convexity.check_all_pairs(family=convexity.thresholds).holds
    assert not convexity.check_four_tokens(lambda f: True).holds


def test_p10_of_four_tokens_by_hand():
    """Up to distance 2 all are alike: the alternating halves have three such pairs, ABBA has four."""
    is_source = np.array([[True, False, True, False], [True, False, False, True]])
    assert convexity.pair_sums(np.array([1, 1, 1, 0]), is_source).tolist() == [3, 4]


def test_p10_is_false_for_windows_that_are_too_short():
    assert not convexity.check_moving_windows(lambda f: convexity.moving_windows(f)[:, 1:]).holds


def merge_the_oldest_chunks(keys, n_merged, chunk_size):
    """A step in which each chunk merges all that it can before the next is asked."""
    labels = []
    for first in range(0, len(keys), chunk_size):
        chunk = keys[first : first + chunk_size]
        n_of_chunk = min(n_merged, -(-len(chunk) // 2)) if len(chunk) > 1 else 0
        n_merged -= n_of_chunk
        own = pooled_round(chunk, n_of_chunk, chunk_size) if n_of_chunk else np.arange(len(chunk))
        labels.append(own + (labels[-1].max() + 1 if labels else 0))
    return np.concatenate(labels)


def test_p11_is_false_for_the_same_merges_in_the_oldest_chunks():
    result = pooled.check_pooled_cut(merge_the_oldest_chunks)
    assert not result.holds
    assert np.isfinite(result.worst)


def test_p11_is_false_for_halves_and_for_unlike_chunks_with_other_numbers():
    assert not pooled.check_pooled_partitions(halves).holds
    assert not pooled.check_pooled_partitions(is_compared=lambda has_same_similarity, has_same_numbers: True).holds
    assert not pooled.check_unlike_chunks(halves).holds


def test_p11_is_false_if_the_youngest_sources_merged_first():
    assert not pooled.check_oldest_first(lambda sources, n_merged: sources[len(sources) - n_merged :]).holds


def test_p12_is_false_for_a_larger_bound_and_without_excess():
    assert not rounds.check_least_spread(lambda f, n_merged: n_merged * (f[0] - f[-1])).holds
    assert not rounds.check_first_step(lambda f, n_merged: Fraction()).holds


def test_p12_is_false_for_the_similarity_of_the_centres_of_runs():
    assert not rounds.check_runs(lambda f, length, distance: length**2 * f[length * distance]).holds


@pytest.mark.slow
@pytest.mark.parametrize("alone", [rounds.even_sources, rounds.odd_sources])
def test_p12_is_false_for_one_alternation_alone(alone):
    assert not rounds.check_rounds((alone,)).holds


def test_p12_eight_tokens_to_three_can_merge_neighbours_five_times():
    keys = rounds.Keys(tuple(Fraction(8 - distance) for distance in range(8)))
    first = keys.step(rounds.tokens_alone(8), (0, 2, 3, 5), 4)
    second = keys.step(first.clusters, (0, 2), 1)
    assert second.clusters == ((0, 1, 2), (3, 4, 5), (6, 7))
    assert first.value + second.value == 5 * Fraction(7, 8) ** 2
    for sources in (rounds.even_sources, rounds.odd_sources):
        (end,) = rounds.outcomes(keys, rounds.tokens_alone(8), 3, lambda size, sources=sources: [sources(size)])
        assert end.value < 5 * Fraction(7, 8) ** 2


def test_even_sources_are_those_of_the_alternating_partition():
    for size in range(2, 9):
        assert [list(rounds.even_sources(size)), list(rounds.odd_sources(size))] == [
            half.tolist() for half in alternating_partition(size)
        ]
