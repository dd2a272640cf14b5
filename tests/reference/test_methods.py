"""A method is a value: a cache calls its `cluster` and knows no method by name."""

from dataclasses import dataclass

import numpy as np
import pytest
from inputs import DTYPES, make_keys

from kvcluster.reference import (
    BoundedCache,
    ClusteredCache,
    Clustering,
    Distinctive,
    SoftMatching,
    chunked_soft_matching,
    distinctive_matching,
    merge,
)

PLAN = {"keep_ratio": 0.4, "chunk_size": 10, "n_sink": 3, "n_recent": 5}
KEYS, VALUES = (make_keys("normal", (2, 2, 48, dim), DTYPES["f32"], seed=dim) for dim in (8, 6))


@dataclass(frozen=True)
class Neighbours:
    """A method that is not ours: runs of neighbours share an entry."""

    def cluster(self, keys, values, *, keep_ratio, chunk_size):
        size = int(1 / keep_ratio)
        labels = np.broadcast_to(np.arange(keys.shape[-2]) // size, keys.shape[:-1])
        return Clustering(labels, np.full((*keys.shape[:-2], keys.shape[-2] // size), size))


def filled(cache):
    cache.append(KEYS, VALUES)
    return cache


def test_the_body_is_what_the_method_says():
    body, rules = slice(3, 43), {"keep_ratio": 0.4, "chunk_size": 10}
    keys, values = KEYS[..., body, :], VALUES[..., body, :]
    for method, clustering in (
        (SoftMatching(), chunked_soft_matching(keys, **rules)),
        (Distinctive(), distinctive_matching(keys, values, **rules)),
        (Distinctive(n_shared=1), distinctive_matching(keys, values, **rules, n_shared=1)),
    ):
        cache = filled(ClusteredCache(**PLAN, method=method))
        assert cache.method is method
        for held, array in ((cache.keys, keys), (cache.values, values)):
            assert np.array_equal(held[..., 3:-5, :], merge(array, clustering))
        assert np.array_equal(cache.counts[..., 3:-5], clustering.counts)


def test_soft_matching_is_the_default():
    assert (
        filled(ClusteredCache(**PLAN)).keys.tobytes()
        == filled(ClusteredCache(**PLAN, method=SoftMatching())).keys.tobytes()
    )


def test_a_method_of_ones_own_needs_no_line_of_ours():
    cache = filled(ClusteredCache(**PLAN | {"keep_ratio": 0.5}, method=Neighbours()))
    assert cache.counts[0, 0].tolist() == [1] * 3 + [2] * 20 + [1] * 5
    cache = filled(ClusteredCache(**PLAN | {"keep_ratio": 0.2, "n_recent": 0}, method=Neighbours()))
    assert cache.counts[0, 0].tolist() == [1] * 3 + [5] * 8 + [1] * 5


@pytest.mark.parametrize("method", [None, "distinctive", 4, SoftMatching, Distinctive])
def test_what_is_no_method_is_refused(method):
    with pytest.raises(TypeError, match="method must be a method such as SoftMatching"):
        ClusteredCache(keep_ratio=0.5, method=method)


def test_methods_are_compared_and_shown_by_what_they_do():
    assert (SoftMatching(), Distinctive()) == (SoftMatching(), Distinctive(n_shared=4))
    assert Distinctive(n_shared=1) != Distinctive()
    assert repr(Distinctive(n_shared=1)) == "Distinctive(n_shared=1)"
    with pytest.raises(ValueError, match="n_shared must be at least 1, got 0"):
        Distinctive(n_shared=0)
    with pytest.raises(TypeError, match="n_shared must be an integer, got None"):
        Distinctive(n_shared=None)


def test_a_budget_is_of_the_bounded_cache_alone():
    assert isinstance(BoundedCache(budget=500, keep_ratio=0.5), ClusteredCache)
    for parameters in ({"budget": 100}, {"n_shared": 4}):
        with pytest.raises(TypeError, match="unexpected keyword"):
            ClusteredCache(keep_ratio=0.5, **parameters)
    with pytest.raises(TypeError, match="unexpected keyword"):
        BoundedCache(budget=200, keep_ratio=0.5, method=Distinctive())
    bounded, free = filled(BoundedCache(budget=21, **PLAN)), filled(ClusteredCache(**PLAN))
    assert bounded.n_stored <= 21 < free.n_stored
    assert np.array_equal(bounded.counts.sum(axis=-1), free.counts.sum(axis=-1))
