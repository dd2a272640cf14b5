"""k-means: by hand, by what a fixed point must be, and fast against reference to the last bit."""

import numpy as np
import pytest
import torch
from agreement import assert_same_bits
from hypothesis import given
from hypothesis import strategies as st
from inputs import DTYPES, KINDS, make_keys, to_torch
from products import prefer_the_last
from scipy.spatial.distance import cdist

from kvcluster import fast, reference
from kvcluster.fast.exact.similarity import canonical_similarity
from kvcluster.fast.plain import assignment
from kvcluster.fast.plain import kmeans as plain_kmeans

FIELDS = ("labels", "counts", "centroids", "members", "first_member")


def assert_same_clusters(ours, expected):
    for name in FIELDS:
        assert_same_bits(getattr(ours, name), getattr(expected, name))


def both(keys, **parameters):
    """Clusters by the reference, after the fast path has found the same."""
    expected = reference.kmeans(keys, **parameters)
    tensors = {name: to_torch(value) if isinstance(value, np.ndarray) else value for name, value in parameters.items()}
    assert_same_clusters(fast.kmeans(to_torch(keys), **tensors), expected)
    return expected


def test_kmeans_by_hand():
    """Tokens 0 and 1 stay with cluster 0; token 2 leaves cluster 1, which keeps the centroid that it had."""
    keys = np.array([[2, 0], [4, 0], [3, 1]], dtype=np.float32)
    clusters = both(keys, n_clusters=2, init=np.array([[1, 0], [0, 1]], dtype=np.float32))
    assert clusters.labels.tolist() == [0, 0, 0]
    assert clusters.counts.tolist() == [3, 0]
    assert clusters.centroids.tolist() == [[3, np.float32(1 / 3)], [0, 1]]
    assert clusters.first_member.tolist() == [0, 3]


def test_kmeans_ties_go_to_the_first_cluster():
    keys = np.array([[1, 0], [1, 0], [1, 1], [0, 0]], dtype=np.float32)
    clusters = both(keys, n_clusters=3, init=np.array([1, 0, 2]), max_iter=1)
    assert clusters.labels.tolist() == [0, 0, 2, 0]


def test_the_metadata_lists_each_clusters_tokens_in_order():
    keys = make_keys("normal", (2, 40, 8), DTYPES["f32"], seed=1)
    clusters = both(keys, n_clusters=7)
    for head in range(2):
        for cluster in range(7):
            first, count = clusters.first_member[head, cluster], clusters.counts[head, cluster]
            tokens = np.flatnonzero(clusters.labels[head] == cluster)
            assert clusters.members[head, first : first + count].tolist() == tokens.tolist()


@pytest.mark.parametrize("is_centred", [False, True])
def test_a_fixed_point_is_one_by_scipys_cosine(is_centred):
    """Every token is nearest to its centroid, and every centroid is the mean of its tokens."""
    keys = make_keys("normal", (300, 16), DTYPES["f32"], seed=2) + np.float32(3 * is_centred)
    clusters = both(keys, n_clusters=12, max_iter=200, is_centred=is_centred)
    mean = keys.mean(axis=0) * is_centred
    distances = cdist(keys.astype(np.float64) - mean, clusters.centroids.astype(np.float64) - mean, metric="cosine")
    assert np.array_equal(distances.argmin(axis=1), clusters.labels)
    clustering = reference.Clustering(clusters.labels, clusters.counts)
    assert np.array_equal(reference.merge(keys, clustering), clusters.centroids)
    other = cdist(keys, clusters.centroids, metric="euclidean")  # wrong twin: another distance
    assert not np.array_equal(other.argmin(axis=1), clusters.labels)


def test_rounds_end_when_the_labels_repeat():
    keys = make_keys("normal", (2, 200, 16), DTYPES["f32"], seed=3)
    long = both(keys, n_clusters=9, max_iter=300)
    longer = both(keys, n_clusters=9, max_iter=301)
    assert np.array_equal(long.centroids, longer.centroids)
    assert not np.array_equal(long.labels, both(keys, n_clusters=9, max_iter=1).labels)
    again = both(keys, n_clusters=9, max_iter=1, init=long.centroids)
    assert np.array_equal(again.labels, long.labels)


def test_init_by_tokens_by_centroids_and_by_default():
    keys = make_keys("normal", (2, 50, 16), DTYPES["f32"], seed=4)
    tokens = np.tile(np.arange(7) * 50 // 7, (2, 1))
    expected = both(keys, n_clusters=7)
    for init in (tokens, np.take_along_axis(keys, tokens[..., None], axis=1)):
        assert np.array_equal(both(keys, n_clusters=7, init=init).labels, expected.labels)
    assert not np.array_equal(both(keys, n_clusters=7, init=tokens + 1).labels, expected.labels)


def test_centring_takes_out_what_all_keys_share():
    """Of 64 small integers every mean is exact: a common shift changes no centred label, and many others."""
    rng = np.random.default_rng(5)
    keys = rng.integers(-8, 9, (64, 8)).astype(np.float32)
    shifted = keys + np.float32(40)
    labels = [both(k, n_clusters=6, is_centred=True).labels for k in (keys, shifted)]
    assert np.array_equal(*labels)
    assert not np.array_equal(both(keys, n_clusters=6).labels, both(shifted, n_clusters=6).labels)


@given(
    tokens=st.integers(1, 90),
    share=st.floats(0, 1),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(list(DTYPES)),
    is_centred=st.booleans(),
    max_iter=st.integers(1, 4),
)
def test_clusters_have_the_same_bits_in_torch(tokens, share, kind, dtype, is_centred, max_iter):
    keys = make_keys(kind, (2, tokens, 24), DTYPES[dtype], seed=tokens)
    n_clusters = max(1, int(share * tokens))
    clusters = both(keys, n_clusters=n_clusters, is_centred=is_centred, max_iter=max_iter)
    assert (clusters.counts.sum(axis=-1) == tokens).all()


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 1), (3, 2, 65, 80), (1000, 128), (0, 5, 8)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_clusters_have_the_same_bits_for_any_shape(shape, dtype, monkeypatch):
    """Also where tiles cut problems and tokens, and where open tokens are settled a few at a time."""
    keys = make_keys("smooth", shape, DTYPES[dtype], seed=6)
    both(keys, n_clusters=max(1, shape[-2] // 5), max_iter=3)
    monkeypatch.setattr(assignment, "WORKING_BYTES", 5000)
    both(np.sign(keys), n_clusters=max(1, shape[-2] // 7), max_iter=3)


def test_members_are_added_in_token_order():
    """1 + 1e30 - 1e30 is 0 in float64, the other way round it is 1."""
    keys = np.array([[1], [1e30], [-1e30]], dtype=np.float32) + np.float32(0)
    one = np.zeros((3, 1), dtype=np.float32)  # a second feature makes all keys alike enough for one cluster
    clusters = both(np.concatenate([keys, one], axis=1), n_clusters=1)
    assert clusters.centroids[0, 0] == 0
    backwards = reference.kmeans(np.concatenate([keys, one], axis=1)[::-1], n_clusters=1)
    assert backwards.centroids[0, 0] != 0


def no_margin(dim, unit):
    return 0.0


def last_of_ties(opened, keys, centroids, labels):
    if opened:
        problem, token, is_open = (torch.cat(parts) for parts in zip(*opened, strict=True))
        scores = canonical_similarity(keys[problem, token].unsqueeze(1), centroids[problem])
        scores = scores.masked_fill(~is_open, -torch.inf)
        labels[problem, token] = scores.shape[1] - 1 - scores.flip(1).argmax(dim=1)
    return 0


def float32_means(keys, labels, kept, away_from=None):
    member = torch.nn.functional.one_hot(labels, kept.shape[1]).float()
    counts = member.sum(dim=1)
    return counts.long(), member.mT @ keys / counts.unsqueeze(-1).clamp(min=1)


@pytest.mark.parametrize(
    ("module", "name", "twin", "kind"),
    [
        (assignment, "margin", no_margin, "near_ties"),
        (assignment, "settle", last_of_ties, "signs"),
        (plain_kmeans, "cluster_means", float32_means, "normal"),
    ],
    ids=["float32 labels", "ties to the last", "float32 means"],
)
def test_wrong_twins_of_kmeans_are_told_apart(module, name, twin, kind, monkeypatch):
    keys = make_keys(kind, (400, 32), DTYPES["f32"], seed=7)
    if twin is no_margin:
        prefer_the_last(monkeypatch)
    both(keys, n_clusters=40, max_iter=3)
    monkeypatch.setattr(module, name, twin)
    with pytest.raises(AssertionError):
        both(keys, n_clusters=40, max_iter=3)


def test_heads_are_problems_of_their_own():
    keys = make_keys("normal", (3, 60, 16), DTYPES["f32"], seed=8)
    whole = both(keys, n_clusters=8)
    for head in range(3):
        assert np.array_equal(reference.kmeans(keys[head], n_clusters=8).labels, whole.labels[head])


def test_the_filter_settles_nearly_all_of_random_keys():
    keys = to_torch(make_keys("normal", (2, 1000, 64), DTYPES["f32"], seed=9))
    made = plain_kmeans.fit(keys, keys[:, ::20].clone(), max_iter=3, is_centred=False)
    assert made.n_rows == 3 * 2000
    assert made.n_scored_rows < 0.01 * made.n_rows
    equal = plain_kmeans.fit(keys.sign(), keys[:, ::20].sign(), max_iter=1, is_centred=False)
    assert equal.n_scored_rows > 0.01 * equal.n_rows
