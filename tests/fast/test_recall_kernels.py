"""The kernels of recall, interpreted where there is no GPU: the reference's clusters, ranking and tokens."""

import numpy as np
import pytest
import torch
from agreement import assert_same_bits, attention_agrees
from inputs import DTYPES, DTYPES_AND_KINDS, make_keys, skip_what_the_interpreter_misreads, slowly, to_numpy, to_torch

from kvcluster import fast, reference
from kvcluster.fast.exact import similarity as exact_similarity
from kvcluster.fast.exact.scores import canonical_scores, make_probe, score_clusters
from kvcluster.fast.kernels import assign as assign_module
from kvcluster.fast.kernels.assign import assign
from kvcluster.fast.kernels.attention import attend
from kvcluster.fast.kernels.kmeans import cluster_means
from kvcluster.fast.kernels.select import cluster_scores, rank
from kvcluster.fast.plain import assignment
from kvcluster.reference.cluster_scores import cluster_scores as reference_scores
from kvcluster.reference.kmeans import assign as reference_assign
from kvcluster.reference.kmeans import update as reference_update
from kvcluster.reference.recall import mean_deviations, mean_of_members, recalled_entries
from kvcluster.reference.recall_cache import RecallCache

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.usefixtures("few_programs"), pytest.mark.slow]


def on_device(array):
    return to_torch(array).to(DEVICE)


def centroids_of(keys, clusters, seed):
    """Tokens, half of them averaged with another one; of signs, ties by the dozen."""
    rng = np.random.default_rng(seed)
    chosen = rng.integers(0, keys.shape[1], (2, clusters))
    first, second = keys[:, chosen[0]].astype(np.float32), keys[:, chosen[1]].astype(np.float32)
    is_mean = rng.random((1, clusters, 1)) < 0.5
    return np.where(is_mean, first / 2 + second / 2, first).astype(np.float32)


def assert_assigned_alike(keys, centroids):
    """By the kernel, by torch and by the reference; how many tokens the filter left open."""
    expected = np.stack([reference_assign(*pair) for pair in zip(keys, centroids, strict=True)])
    labels, is_scored = assign(on_device(keys), on_device(centroids))
    assert_same_bits(labels.cpu(), expected)
    of_torch = assignment.assign(to_torch(keys), *exact_similarity.normalized(to_torch(keys)), to_torch(centroids))[0]
    assert_same_bits(of_torch, expected)
    return int(is_scored.sum())


@pytest.mark.parametrize(("dtype", "kind"), DTYPES_AND_KINDS)
def test_labels_are_the_references_for_keys_of_every_kind(dtype, kind):
    skip_what_the_interpreter_misreads(kind, DTYPES[dtype])
    keys = make_keys(kind, (2, 65, 64), DTYPES[dtype], seed=1)
    assert_assigned_alike(keys, centroids_of(keys, 7, seed=2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "clusters", "dim"),
    [
        (1, 1, 1),
        (63, 2, 5),
        (130, 129, 64),
        (64, 63, 80),
        slowly(20, 300, 128),
        (3, 9, 256),
    ],
)
def test_labels_are_the_references_at_any_size(tokens, clusters, dim, dtype):
    keys = make_keys("normal", (2, tokens, dim), DTYPES[dtype], seed=dim)
    assert_assigned_alike(keys, centroids_of(keys, clusters, seed=tokens))


@pytest.mark.parametrize("dtype", ["f16", "f32"])
def test_the_filter_in_parts_of_16_bits_settles_most_tokens(dtype, monkeypatch):
    keys = make_keys("normal", (1, 100, 64), DTYPES[dtype], seed=3)
    centroids = keys[:, ::6].astype(np.float32)
    assert assert_assigned_alike(keys, centroids) < 5
    monkeypatch.setattr(assign_module, "SPLIT_LEAD", dict.fromkeys(assign_module.SPLIT_LEAD, 9.0))
    assert assert_assigned_alike(keys, centroids) == 100


def test_one_centroid_that_is_not_safe_for_float32_is_still_found():
    keys = make_keys("normal", (1, 40, 16), DTYPES["f32"], seed=4)
    centroids = keys[:, :12].copy()
    centroids[:, 3] *= 1e30
    centroids[:, 5] = 0
    assert assert_assigned_alike(keys, centroids) == 40
    assert int(assign(on_device(keys), on_device(centroids))[0][0, 3]) == 3


def test_labels_do_not_depend_on_strides():
    keys = make_keys("smooth", (64, 3, 32), DTYPES["f16"], seed=5)  # (tokens, problems, dim)
    centroids = centroids_of(keys.transpose(1, 0, 2), 6, seed=6)
    apart = on_device(keys).transpose(0, 1)
    assert torch.equal(assign(apart, on_device(centroids))[0], assign(apart.contiguous(), on_device(centroids))[0])


@pytest.mark.parametrize("twin", ["no certificate", "of ties the last"])
def test_wrong_twins_of_the_assignment_are_told_apart(twin, monkeypatch):
    keys = make_keys("near_ties", (1, 60, 64), DTYPES["f32"], seed=7)
    centroids = centroids_of(keys, 50, seed=8)
    assert assert_assigned_alike(keys, centroids) > 0
    if twin == "no certificate":
        monkeypatch.setattr(assign_module, "margin", lambda dim, unit: 0.0 * dim * unit - 1.0)
        with pytest.raises(AssertionError):
            assert_assigned_alike(keys, centroids)
    else:
        twice = np.concatenate([centroids, centroids], axis=1)
        labels, expected = (assign(on_device(keys), on_device(x))[0] for x in (twice, centroids))
        flipped = assign(on_device(keys), on_device(twice[:, ::-1].copy()))[0]
        assert torch.equal(labels, expected)
        assert not torch.equal(99 - flipped, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_means_are_the_references_and_empty_clusters_keep_their_centroid(dtype):
    keys = make_keys("normal", (2, 70, 80), DTYPES[dtype], seed=9)
    kept = centroids_of(keys, 9, seed=10)
    labels = np.random.default_rng(11).integers(0, 8, (2, 70))  # nothing in cluster 8
    labels[labels == 2] = 3
    counts, means = cluster_means(*map(on_device, (keys, labels, kept)))
    expected = [reference_update(*one) for one in zip(keys, labels, kept, strict=True)]
    assert_same_bits(means.cpu(), np.stack(expected))
    assert_same_bits(counts.cpu(), np.stack([np.bincount(one, minlength=9) for one in labels]))


@pytest.mark.parametrize("option", [{}, {"is_centred": True}, {"max_iter": 1}])
@pytest.mark.parametrize("kind", ["normal", "signs", "duplicates"])
def test_kmeans_by_kernels_is_the_references(kind, option):
    keys = make_keys(kind, (2, 90, 64), DTYPES["f16"], seed=12)
    expected = reference.kmeans(keys, n_clusters=11, **option)
    made = fast.kmeans(on_device(keys), n_clusters=11, backend="triton", **option)
    for name in ("labels", "counts", "centroids"):
        assert_same_bits(getattr(made, name).cpu(), getattr(expected, name))


def scored_clusters(kind, seed, *, tokens=90, clusters=13, dim=64, group=3, dtype="f32"):
    """Query, keys, clusters and deviations of the reference."""
    keys = make_keys(kind, (2, tokens, dim), DTYPES[dtype], seed=seed)
    query = make_keys(kind, (2, group, dim), DTYPES[dtype], seed=seed + 1)
    made = reference.kmeans(keys, n_clusters=clusters, max_iter=2)
    return query, keys, made, mean_deviations(keys, made)


def ranked_by_kernel(query, made, deviations, spread=0.5):
    """Probe, features and mean as `fast.selection` has them."""
    features = torch.cat([to_torch(made.centroids), to_torch(deviations)], dim=-1)
    scored = score_clusters(features, to_torch(made.counts))
    return [x.to(DEVICE) for x in (make_probe(to_torch(query), spread), features, scored.mean)], scored


@pytest.mark.parametrize("kind", ["normal", "signs", "duplicates", "near_ties", "zeros", "huge", "smooth"])
def test_cluster_scores_have_the_reference_bits(kind):
    query, _, made, deviations = scored_clusters(kind, seed=20)
    arguments, scored = ranked_by_kernel(query, made, deviations)
    scores = cluster_scores(*arguments).cpu()
    expected = reference_scores(query, made.centroids, made.counts, deviations, 0.5)
    np.testing.assert_array_equal(to_numpy(scores), expected)
    assert torch.equal(scores, canonical_scores(arguments[0].cpu(), scored, torch.arange(13).expand(2, 13)))
    assert_same_bits(rank(*arguments).cpu(), np.argsort(-expected, axis=-1, kind="stable"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("clusters", "dim", "group"), [(1, 1, 1), (3, 80, 4), (130, 128, 1), (5, 256, 2)])
def test_cluster_scores_are_the_references_at_any_size(clusters, dim, group, dtype):
    sizes = {"tokens": 150, "clusters": clusters, "dim": dim, "group": group, "dtype": dtype}
    query, _, made, deviations = scored_clusters("normal", seed=dim, **sizes)
    arguments, _ = ranked_by_kernel(query, made, deviations)
    expected = reference_scores(query, made.centroids, made.counts, deviations, 0.5)
    np.testing.assert_array_equal(to_numpy(cluster_scores(*arguments).cpu()), expected)


@pytest.mark.parametrize("twin", ["right", "no mean cluster", "no deviations", "first query only", "of ties the last"])
def test_wrong_twins_of_the_ranking_are_told_apart(twin):
    query, _, made, deviations = scored_clusters("signs", seed=30, clusters=20, group=4)
    made = reference.Clusters(made.labels, *(np.repeat(x, 2, axis=1) for x in (made.counts, made.centroids)))
    deviations = np.repeat(deviations, 2, axis=1)
    (probe, features, mean), _ = ranked_by_kernel(query, made, deviations)
    expected = np.argsort(-reference_scores(query, made.centroids, made.counts, deviations, 0.5), kind="stable")
    if twin == "no mean cluster":
        mean = torch.zeros_like(mean)
    elif twin == "no deviations":
        features = torch.cat([features[..., :64], torch.zeros_like(features[..., 64:])], dim=-1)
    elif twin == "first query only":
        probe = probe[:, :1]
    ranking = rank(probe, features, mean).cpu()
    if twin == "of ties the last":
        ranking = 39 - rank(probe, features.flip(1), mean).cpu()
    assert np.array_equal(to_numpy(ranking), expected) == (twin == "right")


@pytest.mark.parametrize("budget", [0, 1, 37, 90, 1000])
def test_taken_tokens_are_the_references(budget):
    query, keys, made, deviations = scored_clusters("duplicates", seed=40)
    expected = reference.select_clusters(query, made.centroids, made.counts, budget=budget, deviations=deviations)
    tensors = map(on_device, (query, made.centroids, made.counts))
    ours = fast.select_clusters(*tensors, budget=budget, deviations=on_device(deviations), backend="triton")
    assert_same_bits(ours.taken.cpu(), expected.taken)
    members = fast.kmeans(on_device(keys), n_clusters=13, max_iter=2, backend="triton")
    assert_same_bits(ours.tokens(members).cpu(), expected.tokens(made))


@pytest.mark.parametrize("rest", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_cache_by_kernels_holds_and_recalls_what_the_references_does(dtype, rest, monkeypatch):
    """Its public names, with no part of the torch implementation left in the way."""
    for place in ("kmeans.assign", "selection.certified_ranking"):
        monkeypatch.delattr(f"kvcluster.fast.plain.{place}")
    parameters = {"budget": 40, "n_sink": 4, "segment_size": 16, "prompt_segment_size": 48, "centroids_for_rest": rest}
    expected, cache = RecallCache(**parameters), fast.RecallCache(**parameters, backend="triton")
    for seed, tokens in enumerate((100, 1, 33, 1)):
        arrays = [make_keys("normal", (1, 2, tokens, 64), DTYPES[dtype], seed=50 + 2 * seed + i) for i in range(2)]
        expected.append(*arrays)
        cache.append(*map(on_device, arrays))
    for name in ("labels", "counts", "centroids"):
        assert_same_bits(getattr(cache.clusters, name).cpu(), getattr(expected.clusters, name))
    assert_same_bits(cache.deviations.cpu(), expected.deviations)
    query = make_keys("normal", (1, 2, 3, 64), DTYPES[dtype], seed=60)
    selection = expected.select_clusters(query)
    assert_same_bits(cache.select_clusters(on_device(query)).taken.cpu(), selection.taken)
    output = cache.attend(on_device(query)).cpu()
    keys, values, counts = map(to_torch, expected.entries(selection))
    assert attention_agrees(output, to_torch(query), keys, values, counts)
    if not rest:
        assert not attention_agrees(output, to_torch(query), keys[..., :-1, :], values[..., :-1, :], counts[..., :-1])


@pytest.mark.parametrize("rest", [False, True])
def test_recall_attention_by_kernels_is_within_the_bound(rest):
    query, keys, made, deviations = scored_clusters("normal", seed=70)
    clusters = fast.Clusters(*map(on_device, (made.labels, made.counts, made.centroids)))
    arrays = [on_device(x) for x in (query, keys, keys)]
    selection = reference.select_clusters(query, made.centroids, made.counts, budget=30, deviations=deviations)
    value_centroids = mean_of_members(keys, made) if rest else None
    entries = [*map(to_torch, recalled_entries(keys, keys, made, selection, value_centroids))]
    for budget in (30, 29):
        output = fast.recall_attention(*arrays, clusters, budget=budget, centroids_for_rest=rest, backend="triton")
        assert attention_agrees(output.cpu(), to_torch(query), *entries) == (budget == 30)


def recalled(seed, *, tokens=300, n_recalled=70, dim=64, group=3, dtype="f32", spread=1.0):
    """Query, keys, values (1, heads, ., dim) and for each head other tokens, in no order, with gaps."""
    rng = np.random.default_rng(seed)
    query = (spread * rng.standard_normal((1, 2, group, dim))).astype(DTYPES[dtype])
    keys, values = rng.standard_normal((2, 1, 2, tokens, dim)).astype(DTYPES[dtype])
    rows = np.stack([rng.permutation(tokens)[:n_recalled] for _ in range(2)])
    rows[1, n_recalled // 2 + 1 :] = -1  # one head recalls fewer
    return tuple(map(on_device, (query, keys, values, rows)))


def attend_rows(query, keys, values, rows, scale):
    return attend(query, keys, values, None, 1, scale, places=rows)


def attended_rows_agree(output, query, keys, values, rows):
    """Each head against the oracle on a gathered copy of its own rows."""
    heads = []
    for head, of_head in enumerate(rows):
        index = of_head[of_head >= 0]
        arrays = output[:, head], query[:, head], keys[:, head, index], values[:, head, index]
        heads.append(attention_agrees(*(x.cpu() for x in arrays)))
    return all(heads)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n_recalled", "dim", "group"), [(1, 64, 1), (2, 5, 3), (63, 80, 4), (257, 128, 17), (300, 64, 5), (65, 256, 2)]
)
def test_attention_to_rows_is_within_the_bound(n_recalled, dim, group, dtype):
    arrays = recalled(dim, n_recalled=n_recalled, dim=dim, group=group, dtype=dtype)
    output = attend_rows(*arrays, dim**-0.5).to(arrays[0].dtype)
    assert attended_rows_agree(output, *arrays)


@pytest.mark.parametrize("dtype", DTYPES)
def test_several_splits_of_which_one_is_empty_are_within_the_bound(dtype, monkeypatch):
    monkeypatch.setattr("kvcluster.fast.kernels.attention.SPLIT", 128)
    arrays = recalled(1, tokens=700, n_recalled=600, dtype=dtype, spread=30.0)
    arrays[3][0, :300] = -1  # the first two splits of the first head, and the last one of the second
    assert attended_rows_agree(attend_rows(*arrays, 64**-0.5).to(arrays[0].dtype), *arrays)


def test_wrong_twins_of_attention_to_rows_are_out_of_bound():
    query, keys, values, rows = arrays = recalled(2)
    twins = {
        "the last row missed": rows[:, :-1].where(rows[:, 1:] >= 0, -1),
        "one row late": (rows + 1).where(rows >= 0, -1),
        "rows of the other head": rows.flip(0),
        "no row taken for the first": rows.clamp(min=0),
    }
    assert attended_rows_agree(attend_rows(*arrays, 64**-0.5), *arrays)
    assert not attended_rows_agree(attend_rows(*arrays, 1.0), *arrays)
    for name, wrong in twins.items():
        assert not attended_rows_agree(attend_rows(query, keys, values, wrong, 64**-0.5), *arrays), name


def test_attention_to_rows_reads_strided_caches_in_place():
    query, keys, values, rows = recalled(3)
    expected = attend_rows(query, keys, values, rows, 0.125)
    apart = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (keys, values)]
    roomy = [torch.nn.functional.pad(x, (0, 0, 0, 9), value=torch.nan)[:, :, :300] for x in (keys, values)]
    for views in (apart, roomy):
        assert torch.equal(attend_rows(query, *views, rows.t().contiguous().t(), 0.125), expected)
