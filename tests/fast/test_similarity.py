"""The canonical similarity: true to the cosine, and the same bits in torch."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from agreement import assert_same_bits
from inputs import DTYPES, KINDS, make_keys, to_torch
from scipy.spatial.distance import cdist

from kvcluster import fast, reference
from kvcluster.reference.similarity import halving_sum


def test_similarity_is_exact_where_every_step_is():
    """Against rational arithmetic: with small integers only the division rounds, and it rounds correctly."""
    rng = np.random.default_rng(0)
    a, b = (rng.integers(-8, 9, (n, 80)).astype(np.float32) for n in (13, 17))
    for i, j in np.ndindex(13, 17):
        dot = sum(Fraction(int(x) * int(y)) for x, y in zip(a[i], b[j], strict=True))
        norms = sum(int(x) ** 2 for x in a[i]) * sum(int(y) ** 2 for y in b[j])
        assert reference.similarity(a[i : i + 1], b[j : j + 1])[0, 0] == float(dot * abs(dot) / norms)


def test_similarity_orders_pairs_as_scipys_cosine_does():
    rng = np.random.default_rng(1)
    a, b = (rng.standard_normal((n, 64)).astype(np.float32) for n in (20, 30))
    cosine = 1 - cdist(a.astype(np.float64), b.astype(np.float64), metric="cosine")
    assert np.array_equal(np.argsort(reference.similarity(a, b).ravel()), np.argsort(cosine.ravel()))


@pytest.mark.parametrize("dim", [1, 2, 3, 64, 80, 127, 128])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_similarity_has_the_same_bits_in_torch(kind, dtype, dim):
    a = make_keys(kind, (2, 9, dim), DTYPES[dtype], seed=dim)
    b = make_keys(kind, (2, 8, dim), DTYPES[dtype], seed=dim + 1)
    assert_same_bits(fast.similarity(to_torch(a), to_torch(b)), reference.similarity(a, b))


def test_similarity_wrong_twin_float32_is_told_apart():
    """The twin is what most implementations do: normalise and multiply in float32."""
    a = make_keys("normal", (50, 64), DTYPES["f32"], seed=2)
    cosine = torch.nn.functional.normalize(to_torch(a)) @ torch.nn.functional.normalize(to_torch(a)).T
    with pytest.raises(AssertionError):
        assert_same_bits((cosine * cosine.abs()).double(), reference.similarity(a, a))


def test_similarity_of_a_zero_key_is_zero():
    keys = np.array([[0, 0], [1, 2]], dtype=np.float32)
    assert np.array_equal(reference.similarity(keys, keys), [[0, 0], [0, 1]])


def test_halving_sum_adds_in_the_documented_order():
    """(1 + 2**-53) + 2**-53 is 1, 1 + (2**-53 + 2**-53) is not: the order shows."""
    tiny = 2.0**-53
    assert halving_sum(np.array([[1, tiny, tiny, 0]]))[0] == 1  # (1 + tiny) + (tiny + 0)
    assert halving_sum(np.array([[1, tiny, 0, tiny]]))[0] > 1  # (1 + 0) + (tiny + tiny)
