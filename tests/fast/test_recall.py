"""Selection and recall: against rational arithmetic, by their identities, and fast against reference."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from agreement import assert_same_bits, attention_agrees, equal_in_float64
from hypothesis import given
from hypothesis import strategies as st
from inputs import DTYPES, KINDS, make_keys, to_torch
from products import prefer_the_last

from kvcluster import fast, reference
from kvcluster.fast.exact import scores as cluster_scores
from kvcluster.fast.plain import selection
from kvcluster.fast.recall import mean_deviations as fast_deviations
from kvcluster.reference.recall import mean_deviations, mean_of_members, recalled_entries, round_to_bfloat16


def selected(query, centroids, counts, **parameters):
    """Tokens taken of each cluster by the reference, after the fast path has taken the same."""
    expected = reference.select_clusters(query, centroids, counts, **parameters)
    tensors = {name: to_torch(value) if isinstance(value, np.ndarray) else value for name, value in parameters.items()}
    ours = fast.select_clusters(*map(to_torch, (query, centroids, counts)), **tensors)
    assert_same_bits(ours.taken, expected.taken)
    return expected.taken


def spent(scores, counts, budget):
    """A budget spent by hand: clusters from the best score down, of ties the first."""
    taken = [0] * len(counts)
    for cluster in sorted(range(len(counts)), key=lambda c: (-scores[c], c)):
        taken[cluster] = min(budget, int(counts[cluster]))
        budget -= taken[cluster]
    return taken


@given(seed=st.integers(0, 10**6), group=st.integers(1, 4), has_deviations=st.booleans())
def test_selection_is_right_in_rational_arithmetic(seed, group, has_deviations):
    """Small integers and eight clusters: every product, sum and mean is exact."""
    rng = np.random.default_rng(seed)
    query, centroids, deviations = (rng.integers(-3, 4, (n, 5)).astype(np.float32) for n in (group, 8, 8))
    deviations = np.abs(deviations)
    counts = rng.integers(1, 5, 8)
    budget = int(rng.integers(0, counts.sum() + 3))

    def score(q, centroid, deviation):
        reached = sum(Fraction(abs(int(x)) * int(d)) for x, d in zip(q, deviation, strict=True)) / 2 * has_deviations
        return sum(Fraction(int(x) * int(c)) for x, c in zip(q, centroid, strict=True)) + reached

    rows = [[score(q, c, d) for c, d in zip(centroids, deviations, strict=True)] for q in query]
    scores = [max(row[c] - sum(row) / 8 for row in rows) for c in range(8)]
    parameters = {"deviations": deviations} if has_deviations else {}
    taken = selected(query, centroids, counts, budget=budget, **parameters)
    assert taken.tolist() == spent(scores, counts, budget)
    assert taken.sum() == min(budget, counts.sum())


def test_one_query_without_deviations_ranks_by_the_dot_product():
    """The paper's rule."""
    query, centroids = (make_keys("normal", (n, 16), DTYPES["f32"], seed=n) for n in (1, 50))
    counts = np.random.default_rng(0).integers(1, 9, 50)
    dots = centroids.astype(np.float64) @ query[0].astype(np.float64)
    assert selected(query, centroids, counts, budget=60).tolist() == spent(dots, counts, 60)


def test_a_query_to_which_all_is_near_does_not_outvote_the_others():
    query = np.array([[8, 0], [0, 1]], dtype=np.float32)
    centroids = np.array([[5.25, 1], [5, 3]], dtype=np.float32)
    assert selected(query, centroids, np.array([1, 1]), budget=1).tolist() == [1, 0]
    assert selected(query, centroids - np.float32([0.25, 0]), np.array([1, 1]), budget=1).tolist() == [1, 0]
    centroids[0, 0] = 5
    assert selected(query, centroids, np.array([1, 1]), budget=1).tolist() == [0, 1]


def test_the_first_tokens_of_the_last_cluster_are_kept():
    keys = np.array([[1, 0], [0, 1], [1, 0], [0, 1], [0, 1]], dtype=np.float32)
    clusters = reference.kmeans(keys, n_clusters=2, init=np.array([0, 1]))
    chosen = reference.select_clusters(np.float32([[2, 1]]), clusters.centroids, clusters.counts, budget=4)
    assert chosen.tokens(clusters).tolist() == [0, 2, 1, 3]


def problem(kind, dtype, tokens, *, dim=16, group=3, lead=(2,), n_clusters=None):
    """Query, keys, values, clusters and deviations of the reference."""
    keys, query, values = (
        make_keys(of, (*lead, n, size), DTYPES[dtype], seed)
        for of, n, size, seed in ((kind, tokens, dim, 1), (kind, group, dim, 2), ("normal", tokens, 6, 3))
    )
    clusters = reference.kmeans(keys, n_clusters=n_clusters or max(1, tokens // 6), max_iter=2)
    return query, keys, values, clusters, mean_deviations(keys, clusters)


@given(
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(list(DTYPES)),
    tokens=st.integers(1, 80),
    budget=st.integers(0, 90),
    spread=st.sampled_from([0, 0.5, 0.3, 1]),
    lead=st.sampled_from([(), (2,), (2, 2)]),
)
def test_the_same_tokens_are_recalled_in_torch(kind, dtype, tokens, budget, spread, lead):
    query, _, _, clusters, deviations = problem(kind, dtype, tokens, lead=lead)
    parameters = {"budget": budget, "spread": spread}
    expected = reference.select_clusters(
        query, clusters.centroids, clusters.counts, deviations=deviations, **parameters
    )
    ours = fast.Clusters(*map(to_torch, (clusters.labels, clusters.counts, clusters.centroids)))
    chosen = fast.select_clusters(
        to_torch(query), ours.centroids, ours.counts, deviations=to_torch(deviations), **parameters
    )
    assert_same_bits(chosen.taken, expected.taken)
    recalled = chosen.tokens(ours)
    assert_same_bits(recalled, expected.tokens(clusters))
    assert recalled.shape == (*lead, min(budget, tokens))
    for problem_index in np.ndindex(*lead):
        row = recalled[problem_index].tolist()
        assert len(set(row)) == len(row)


def test_many_clusters_are_ranked_in_part_and_where_that_is_not_enough_in_full():
    query, centroids = (make_keys("normal", (2, n, 32), DTYPES["f32"], seed=n) for n in (3, 2000))
    for counts in (np.full((2, 2000), 8), np.where(np.arange(2000) < 1990, 0, 400) * np.ones((2, 1), dtype=int)):
        selected(query, centroids, counts, budget=500)


@pytest.mark.parametrize("kind", ["huge", "tiny", "zeros"])
def test_queries_that_float32_cannot_score_are_scored_canonically(kind):
    centroids = make_keys("normal", (40, 8), DTYPES["f32"], seed=4)
    query = make_keys(kind, (2, 8), DTYPES["f32"], seed=5) * np.float32(10 if kind == "huge" else 1)
    selected(query, centroids, np.full(40, 3), budget=50)


@pytest.mark.parametrize("twin", ["no certificate", "ties to the last", "the group's sum"])
def test_wrong_twins_of_selection_are_told_apart(twin, monkeypatch):
    kind = "signs" if twin == "ties to the last" else "near_ties" if twin == "no certificate" else "normal"
    query, centroids = (make_keys(kind, (20, n, 64), DTYPES["f32"], seed=n) for n in (4, 60))
    parameters = {"budget": 70}
    counts = np.full((20, 60), 3)
    if twin == "no certificate":
        prefer_the_last(monkeypatch)
    selected(query, centroids, counts, **parameters)
    right_scores, right_settle = cluster_scores.approximate_scores, selection.settle
    if twin == "no certificate":
        monkeypatch.setattr(selection, "approximate_scores", lambda *args: (right_scores(*args)[0], torch.zeros(20, 1)))
    elif twin == "ties to the last":
        monkeypatch.setattr(selection, "settle", lambda ranking, *rest: right_settle(ranking, *rest).flip(-1))
    else:
        monkeypatch.setattr(
            "kvcluster.fast.selection.make_probe", lambda q, s: cluster_scores.make_probe(q.sum(1, keepdim=True), s)
        )
    with pytest.raises(AssertionError):
        selected(query, centroids, counts, **parameters)


def test_deviations_are_mean_distances_feature_by_feature():
    keys = np.array([[1, 0], [3, 0], [0, 5]], dtype=np.float32)
    clusters = reference.kmeans(keys, n_clusters=2, init=np.array([0, 2]))
    assert mean_deviations(keys, clusters).tolist() == [[1, 0], [0, 0]]
    for kind in KINDS:
        _, keys, _, clusters, deviations = problem(kind, "f32", 70)
        ours = fast.Clusters(*map(to_torch, (clusters.labels, clusters.counts, clusters.centroids)))
        assert_same_bits(fast_deviations(to_torch(keys), ours, "torch"), deviations)


def test_rounding_to_bfloat16_is_that_of_torch():
    numbers = make_keys("huge", (100, 7), DTYPES["f32"], seed=6) * np.float32(3)
    numbers = np.concatenate([numbers, make_keys("tiny", (100, 7), DTYPES["f32"], seed=7)])
    largest = torch.finfo(torch.bfloat16).max
    assert_same_bits(to_torch(numbers).clamp(-largest, largest).bfloat16().float(), round_to_bfloat16(numbers))
    assert np.isfinite(round_to_bfloat16(np.float32([3.4028235e38, -3.4028235e38]))).all()


def test_a_budget_for_all_is_full_attention():
    query, keys, values, clusters, _ = problem("normal", "f32", 65)
    full = reference.attention(query, keys, values)
    assert equal_in_float64(reference.recall_attention(query, keys, values, clusters, budget=65), full)
    assert not equal_in_float64(reference.recall_attention(query, keys, values, clusters, budget=64), full)


def test_centroids_stand_for_the_rest_exactly_where_keys_are_equal():
    """Pairs of equal keys, whose values' means are exact: with centroids and log counts nothing is missing."""
    keys, query = (make_keys("normal", (2, n, 16), DTYPES["f32"], seed=n) for n in (20, 3))
    keys = np.concatenate([keys, keys], axis=1)
    values = np.random.default_rng(8).integers(-8, 9, (2, 40, 6)).astype(np.float32)
    clusters = reference.kmeans(keys, n_clusters=20, init=np.tile(np.arange(20), (2, 1)))
    full = reference.attention(query, keys, values)
    outputs = [
        reference.recall_attention(query, keys, values, clusters, budget=12, centroids_for_rest=rest)
        for rest in (True, False)
    ]
    assert equal_in_float64(outputs[0], full)
    assert not equal_in_float64(outputs[1], full)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rest", [False, True])
def test_recall_attention_is_attention_to_the_recalled_tokens(dtype, rest):
    query, keys, values, clusters, deviations = problem("normal", dtype, 130, dim=32, lead=(2, 2))
    tensors = [*map(to_torch, (query, keys, values))]
    ours = fast.Clusters(*map(to_torch, (clusters.labels, clusters.counts, clusters.centroids)))
    output = fast.recall_attention(*tensors, ours, budget=40, centroids_for_rest=rest)
    chosen = reference.select_clusters(query, clusters.centroids, clusters.counts, budget=40, deviations=deviations)
    of_values = mean_of_members(values, clusters) if rest else None
    entries = [*map(to_torch, recalled_entries(keys, values, clusters, chosen, of_values))]
    assert entries[0].shape[-2] == 40 + rest * clusters.counts.shape[-1]
    assert attention_agrees(output, tensors[0], *entries)
    less = fast.recall_attention(*tensors, ours, budget=39, centroids_for_rest=rest)
    assert not attention_agrees(less, tensors[0], *entries)
    assert not attention_agrees(fast.attention(*tensors), tensors[0], *entries)


def test_lists_of_different_lengths_are_filled_up():
    query, keys, values, clusters, _ = problem("normal", "f32", 65)
    chosen = reference.Selection(np.stack([clusters.counts[0], np.minimum(clusters.counts[1], 1)]))
    ours = fast.Clusters(*map(to_torch, (clusters.labels, clusters.counts, clusters.centroids)))
    tokens = chosen.tokens(clusters)
    assert_same_bits(fast.Selection(to_torch(chosen.taken)).tokens(ours), tokens)
    assert tokens.shape == (2, 65)
    assert (tokens[1] >= 0).sum() == (clusters.counts[1] > 0).sum()
    entries = recalled_entries(keys, values, clusters, chosen, None)
    kept = tokens[1][tokens[1] >= 0]
    alone = reference.attention(query[1], keys[1][kept], values[1][kept])
    assert equal_in_float64(reference.clustered_attention(query, *entries)[1], alone)
