"""The claims C6 to C8 of theory/complexity hold, and their checks fail for false ones."""

from fractions import Fraction

import numpy as np
import pytest

from kvcluster.reference.pooled_matching import compress_entries
from kvcluster.theory.complexity import closed_forms, pooled
from kvcluster.theory.complexity.counting import Operations, count


@pytest.mark.parametrize(
    "check",
    [pooled.check_pooled_counts, pooled.check_compared_pairs, pooled.check_decoding, pooled.check_decoding_share],
    ids=lambda check: check.__name__.removeprefix("check_"),
)
def test_claim_holds(check):
    result = check()
    assert result.holds, result


def test_counts_of_three_entries_can_be_added_by_hand():
    """Entry 0 or 2 joins 1: two pairs of dim 2, three norms; weights, sums and means of keys and of values."""
    keys = np.array([[1, 0], [0, 1], [1, 1]], dtype=np.float32)
    counts = np.array([1, 2, 1], dtype=np.int32)
    counted, moved, _ = count(compress_entries, keys, keys, counts, target=2, chunk_size=3)
    assert counted.multiplications == (2 * 2 + 3 * 2 + 2 * 2) + 3 * 4
    assert counted.additions == (2 + 3) + 3 * 4
    assert counted.divisions == 2 + 2 * 4
    assert (counted.comparisons, counted.sorted, counted.exponentials) == (2, 2, 0)
    assert moved == 3 * (2 + 2) * 4 + 3 * 4 + 2 * (2 + 2) * 4 + 2 * 4


@pytest.mark.parametrize("kind", ["multiplications", "additions", "divisions", "comparisons", "sorted"])
def test_c6_is_false_by_one_operation(kind):
    def one_more(*args, **kwargs):
        return closed_forms.pooled_operations(*args, **kwargs) + Operations(**{kind: 1})

    assert not pooled.check_pooled_counts(one_more).holds


def test_c6_is_false_if_weights_were_free():
    def free(entries, dim, dim_value, *, target, **kwargs):
        sizes = closed_forms.round_sizes(entries, target)[:-1] if entries > target else []
        weights = Operations(multiplications=-2 * sum(sizes) * (dim + dim_value))
        return closed_forms.pooled_operations(entries, dim, dim_value, target=target, **kwargs) + weights

    assert not pooled.check_pooled_counts(free).holds


def test_c6_is_false_if_a_last_chunk_were_left_as_it_is(monkeypatch):
    monkeypatch.setattr(closed_forms, "chunks_of", lambda entries, chunk_size: [chunk_size] * (entries // chunk_size))
    assert not pooled.check_pooled_counts().holds


def test_c6_closed_form_of_whole_chunks():
    for target, steps, chunk_size, dim in ((32, 1, 64, 80), (16, 2, 32, 64), (24, 3, 16, 3)):
        entries = target * 2**steps
        made = closed_forms.pooled_operations(entries, dim, dim, target=target, chunk_size=chunk_size)
        assert made.multiplications == (entries - target) * (chunk_size * (dim + 2) // 2 + 6 * dim)


def test_c7_is_false_for_one_step_alone():
    assert not pooled.check_compared_pairs(lambda tokens, target, chunk_size: tokens * chunk_size // 4).holds
    assert not pooled.check_compared_pairs(most=lambda tokens, target, chunk_size: tokens * chunk_size // 4).holds


def test_c8_is_false_for_one_token_more_in_an_interval():
    def later(*args, interval, **kwargs):
        return pooled.cost_of_a_token(*args, interval=interval + 1, **kwargs)

    assert not pooled.check_decoding(later).holds


def test_c8_is_false_for_half_of_the_chunk():
    def halved(*args, chunk_size, **kwargs) -> Fraction:
        return pooled.largest_share(*args, chunk_size=chunk_size // 2, **kwargs)

    assert not pooled.check_decoding_share(halved).holds
