"""Full and clustered attention: against PyTorch's own, by their identities, and fast against reference."""

import numpy as np
import pytest
import torch
from agreement import at_most_in_float64, attention_agrees, equal_in_float64
from hypothesis import given
from hypothesis import strategies as st
from inputs import DTYPES, make_keys, to_torch

from kvcluster import fast, reference


def problem(seed, *, tokens=65, dim=64, group=3, dtype="f32", spread=1.0):
    """Query, keys, values (2, ., .) and counts (2, tokens)."""
    rng = np.random.default_rng(seed)
    query = spread * rng.standard_normal((2, group, dim))
    keys, values = rng.standard_normal((2, tokens, dim)), rng.standard_normal((2, tokens, 24))
    arrays = [array.astype(DTYPES[dtype]) for array in (query, keys, values)]
    return *arrays, rng.integers(1, 100, (2, tokens))


@pytest.mark.parametrize("scale", [None, 0.3])
def test_attention_equals_pytorchs_in_float64(scale):
    query, keys, values, _ = problem(0)
    theirs = torch.nn.functional.scaled_dot_product_attention(
        *(to_torch(array).double() for array in (query, keys, values)), scale=scale
    )
    assert equal_in_float64(reference.attention(query, keys, values, scale=scale), theirs.numpy())
    assert not equal_in_float64(reference.attention(query, keys, values, scale=0.31), theirs.numpy())


def test_clustered_attention_equals_attention_to_repeated_entries():
    """An entry of count n is n equal tokens: repeat them and PyTorch's attention gives the same."""
    query, keys, values, counts = problem(1, tokens=9)
    theirs = torch.stack(
        [
            torch.nn.functional.scaled_dot_product_attention(
                to_torch(query[head]).double(),
                to_torch(keys[head]).double().repeat_interleave(to_torch(counts[head]), dim=0),
                to_torch(values[head]).double().repeat_interleave(to_torch(counts[head]), dim=0),
            )
            for head in range(2)
        ]
    ).numpy()
    assert equal_in_float64(reference.clustered_attention(query, keys, values, counts), theirs)
    assert not equal_in_float64(reference.attention(query, keys, values), theirs)  # wrong twin: log counts dropped


@given(seed=st.integers(0, 10**6), pairs=st.integers(1, 20))
def test_merging_equal_keys_leaves_attention_unchanged(seed, pairs):
    """Whatever the values are; the values here average without rounding."""
    rng = np.random.default_rng(seed)
    keys = rng.standard_normal((pairs, 16)).astype(np.float32).repeat(2, axis=0)
    values = rng.integers(-8, 9, (2 * pairs, 4)).astype(np.float32)
    query = rng.standard_normal((3, 16)).astype(np.float32)
    clustering = reference.Clustering(np.arange(pairs).repeat(2), np.full(pairs, 2))
    merged = reference.merge(keys, clustering), reference.merge(values, clustering)
    full = reference.attention(query, keys, values)
    assert equal_in_float64(reference.clustered_attention(query, *merged, clustering.counts), full)


@given(seed=st.integers(0, 10**6), size=st.integers(1, 12))
def test_a_centroid_never_gets_more_weight_than_its_tokens(seed, size):
    """Jensen: q . centroid + log n <= logsumexp(q . k_i), in the logits themselves."""
    rng = np.random.default_rng(seed)
    keys = rng.standard_normal((size, 8)).astype(np.float32)
    query = rng.standard_normal(8)
    centroid = reference.merge(keys, reference.Clustering(np.zeros(size, dtype=np.int64), np.array([size])))[0]
    exact = keys.astype(np.float64).mean(axis=0)
    rounding = np.abs(query) @ np.abs(centroid - exact)  # the centroid was rounded to float32
    true_logit = np.logaddexp.reduce(keys.astype(np.float64) @ query)
    assert at_most_in_float64(query @ centroid + np.log(size), true_logit + rounding)


def test_an_entry_of_count_zero_takes_no_part():
    query, keys, values, counts = problem(2)
    counts[:, 10:] = 0
    expected = reference.clustered_attention(query, keys[:, :10], values[:, :10], counts[:, :10])
    assert equal_in_float64(reference.clustered_attention(query, keys, values, counts), expected)
    assert attention_agrees(
        fast.clustered_attention(*map(to_torch, (query, keys, values, counts))),
        *map(to_torch, (query, keys, values, counts)),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 2, 63, 64, 65, 1000])
@pytest.mark.parametrize(("dim", "group"), [(64, 1), (80, 3), (128, 4)])
def test_fast_attention_is_within_the_bound(dim, group, tokens, dtype):
    query, keys, values, counts = map(to_torch, problem(dim, tokens=tokens, dim=dim, group=group, dtype=dtype))
    assert attention_agrees(fast.attention(query, keys, values), query, keys, values)
    assert attention_agrees(fast.clustered_attention(query, keys, values, counts), query, keys, values, counts)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fast_attention_wrong_twins_are_out_of_bound(dtype):
    query, keys, values, counts = map(to_torch, problem(3, dtype=dtype))
    twins = {
        "log counts dropped": fast.attention(query, keys, values),
        "twice the log counts": fast.clustered_attention(query, keys, values, counts**2),
        "last entry missed": fast.clustered_attention(query, keys[:, :-1], values[:, :-1], counts[:, :-1]),
        "scale forgotten": fast.clustered_attention(query, keys, values, counts, scale=1.0),
    }
    for name, output in twins.items():
        assert not attention_agrees(output, query, keys, values, counts), name


def test_heads_commute_with_attention():
    query, keys, values, counts = problem(4)
    swapped = reference.clustered_attention(query[::-1], keys[::-1], values[::-1], counts[::-1])
    assert np.array_equal(swapped, reference.clustered_attention(query, keys, values, counts)[::-1])


def test_the_agreement_rule_refuses_what_cannot_be_compared():
    query, keys, values, counts = map(to_torch, problem(5))
    output = fast.clustered_attention(query, keys, values, counts)
    with pytest.raises(ValueError, match="output must have shape"):
        attention_agrees(output[:, :1], query, keys, values, counts)
    with pytest.raises(ValueError, match="output must have the dtype of query"):
        attention_agrees(output.double(), query, keys, values, counts)
    with pytest.raises(ValueError, match="output must be finite"):
        attention_agrees(output * torch.nan, query, keys, values, counts)


def test_huge_logits_do_not_overflow():
    query, keys, values, counts = problem(6, spread=1e4)
    assert np.isfinite(reference.clustered_attention(query, keys, values, counts)).all()
    assert attention_agrees(
        fast.clustered_attention(*map(to_torch, (query, keys, values, counts))),
        *map(to_torch, (query, keys, values, counts)),
    )


def test_keys_of_every_kind_are_made_in_the_dtype_asked_for():
    for name, dtype in DTYPES.items():
        assert make_keys("huge", (4, 8), dtype, seed=0).dtype == dtype, name
