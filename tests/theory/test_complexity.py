"""The claims C1 to C5 of theory/complexity hold, and their checks fail for false ones."""

import numpy as np
import pytest

from kvcluster import reference
from kvcluster.theory.complexity import checks as complexity
from kvcluster.theory.complexity import closed_forms
from kvcluster.theory.complexity.counting import Operations, count


@pytest.mark.parametrize(
    "check",
    [
        complexity.check_matching_counts,
        complexity.check_kmeans_counts,
        complexity.check_attention_counts,
        complexity.check_count_exponents,
        complexity.check_break_even,
        pytest.param(complexity.check_time_exponents, marks=pytest.mark.slow),
        pytest.param(complexity.check_break_even_in_time, marks=pytest.mark.slow),
    ],
    ids=lambda check: check.__name__.removeprefix("check_"),
)
def test_claim_holds(check):
    result = check()
    assert result.holds, result


def test_at_least_twenty_shapes_of_matching_are_counted():
    assert complexity.check_matching_counts().cases >= 20
    whole = [shape for shape in complexity.MATCHING_SHAPES if shape[3] == shape[0] > 2]
    assert len(whole) >= 5


def test_counts_of_three_tokens_can_be_added_by_hand():
    """Two sources, one destination, dim 2: products 2 + 2 x 2 + (2 + 1) x 2 and the two of each score."""
    keys = np.array([[1, 0], [0, 1], [1, 1]], dtype=np.float32)
    counted, moved, _ = count(reference.chunked_soft_matching, keys, keep_ratio=0.6, chunk_size=3)
    assert counted.multiplications == 2 * 2 + (2 + 1) * 2 + 2 * 2
    assert counted.additions == 3 * 2 + 2 + 2 + 1  # of three tokens to three means; of products and of squares
    assert counted.divisions == 3 * 2 + 2
    assert (counted.comparisons, counted.sorted, counted.exponentials) == (2, 2, 0)
    assert moved == 3 * 2 * 4 + 8 * (3 + 2)


def test_counting_changes_no_result():
    keys = np.random.default_rng(0).standard_normal((2, 40, 6)).astype(np.float32)
    *_, counted = count(reference.chunked_soft_matching, keys, keep_ratio=0.25, chunk_size=16)
    plain = reference.chunked_soft_matching(keys, keep_ratio=0.25, chunk_size=16)
    assert counted.labels.tobytes() == plain.labels.tobytes()
    assert type(plain.labels) is np.ndarray


def test_an_operation_without_a_defined_cost_is_refused():
    with pytest.raises(NotImplementedError, match="no cost is defined for sqrt"):
        count(lambda array: array**0.5, np.ones(3))
    with pytest.raises(NotImplementedError, match="no cost is defined for median"):
        count(np.median, np.ones(3))


def off_by(**changes):
    """A closed form that is off by a few operations, as soon as there are any."""

    def wrap(form):
        def changed(*args, **kwargs):
            right = form(*args, **kwargs)
            return right + Operations(**changes) if right.total else right

        return changed

    return wrap


@pytest.mark.parametrize("kind", ["multiplications", "additions", "divisions", "comparisons", "sorted"])
def test_c1_is_false_by_one_operation(kind):
    wrong = off_by(**{kind: 1})(closed_forms.matching_operations)
    assert not complexity.check_matching_counts(wrong).holds


def test_c1_is_false_without_the_padding_of_halving_sums(monkeypatch):
    monkeypatch.setattr(closed_forms, "padded", lambda dim: dim)
    assert not complexity.check_matching_counts().holds


def test_c1_is_false_for_rounds_that_halve_downwards(monkeypatch):
    def halved_downwards(chunk_size, target):
        sizes = [chunk_size]
        while sizes[-1] > target:
            sizes.append(max(target, sizes[-1] // 2))
        return sizes

    monkeypatch.setattr(closed_forms, "round_sizes", halved_downwards)
    assert not complexity.check_matching_counts().holds


def test_c1_products_of_powers_of_two():
    for chunk_size, rounds, dim in ((64, 1, 80), (64, 2, 64), (128, 7, 3)):
        made = closed_forms.matching_operations(chunk_size, dim, keep_ratio=0.5**rounds, chunk_size=chunk_size)
        thirds = chunk_size**2 * (dim + 2) * (4**rounds - 1) // 4**rounds
        assert 3 * made.multiplications == thirds + 6 * chunk_size * dim * (2**rounds - 1) // 2**rounds


def test_c2_is_false_without_parts_or_with_an_update_more(monkeypatch):
    def one_more(*args, updates, **kwargs):
        return closed_forms.kmeans_operations(*args, updates=updates + 1, **kwargs)

    assert not complexity.check_kmeans_counts(one_more).holds
    monkeypatch.setattr(closed_forms, "ROWS_TOGETHER", 10**9)
    assert not complexity.check_kmeans_counts().holds


def test_c3_is_false_if_log_counts_were_free():
    def free(*args, is_clustered=False, **kwargs):
        return closed_forms.attention_operations(*args, **kwargs)

    assert not complexity.check_attention_counts(free).holds


def test_c4_is_false_for_chunks_that_grow():
    assert not complexity.check_count_exponents(lambda tokens: tokens // 64).holds


@pytest.mark.slow
def test_c4_is_false_in_time_for_chunks_that_grow():
    assert not complexity.check_time_exponents(lambda tokens: tokens // 64, turns=1).holds


@pytest.mark.slow
def test_c5_is_false_for_one_token_less_and_for_means_that_cost():
    assert not complexity.check_break_even(lambda *args, **kwargs: closed_forms.break_even(*args, **kwargs) - 1).holds

    def without_group(*args, group, **kwargs):
        return closed_forms.break_even(*args, group=1, **kwargs)

    assert not complexity.check_break_even(without_group).holds


def test_c5_closed_form_of_powers_of_two():
    for chunk_size, rounds, dim, group in ((64, 2, 64, 1), (64, 2, 64, 4), (32, 1, 80, 3)):
        keep_ratio = 0.5**rounds
        spent = chunk_size * (dim + 2) * (1 + keep_ratio) / 3 + 2 * dim
        found = closed_forms.break_even(64 * chunk_size, dim, group=group, keep_ratio=keep_ratio, chunk_size=chunk_size)
        assert found == int(np.ceil(spent / (group * (2 * dim + 1))))
