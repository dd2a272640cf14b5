"""ClusterKV as published: random samples, selection per query head, a budget of recalled tokens; the same in torch."""

import itertools

import numpy as np
import pytest
import torch
from agreement import assert_same_bits, attention_agrees
from caches import make_tiered
from hypothesis import given
from hypothesis import strategies as st
from inputs import DTYPES, make_keys, to_numpy, to_torch

from kvcluster import fast, reference
from kvcluster.fast.memory import body_clusters
from kvcluster.fast.memory.segments import RecallSettings
from kvcluster.fast.tiers import TieredRecallCache
from kvcluster.reference.sampling import sample_tokens
from kvcluster.reference.segments import SegmentPlan

SIZES = {"n_sink": 3, "tokens_per_cluster": 4, "segment_size": 10, "prompt_segment_size": None}
OPTIONS = {"init_seed": 5, "is_per_query_head": True, "is_exact_counted": False}
SMALL = {"budget": 12, **SIZES, **OPTIONS}
LEAD = (2, 3)


def tokens_of(seed, n_tokens, *, dtype="f32", kind="normal", lead=LEAD):
    return [make_keys(of, (*lead, n_tokens, 16), DTYPES[dtype], seed + i) for i, of in enumerate((kind, "normal"))]


def query_of(seed, *, dtype="f32", lead=LEAD, group=4):
    return make_keys("normal", (*lead, group, 16), DTYPES[dtype], seed)


def filled(cache, arrays, cuts=(), convert=np.copy):
    for start, stop in itertools.pairwise([0, *cuts, arrays[0].shape[-2]]):
        cache.append(*(convert(array[..., start:stop, :]) for array in arrays))
    return cache


def is_same_cache(ours, expected):
    """Whether clusters and what is held have the reference's bits."""
    pairs = [(getattr(ours.clusters, name), getattr(expected.clusters, name)) for name in ("labels", "counts")]
    pairs += [(ours.clusters.centroids, expected.clusters.centroids), (ours.deviations, expected.deviations)]
    pairs += [(ours.keys, expected.keys), (ours.values, expected.values)]
    return all(to_numpy(mine.contiguous()).tobytes() == theirs.tobytes() for mine, theirs in pairs)


def attends_to(output, query, entries):
    """Whether each query head attended to entries of its own, (..., group, entries, .)."""
    output, query, *entries = (to_torch(x) if isinstance(x, np.ndarray) else x for x in (output, query, *entries))
    return attention_agrees(output.unsqueeze(-2), query.unsqueeze(-2), *entries)


@given(
    n_tokens=st.integers(20, 120),
    cut=st.integers(0, 120),
    options=st.sets(st.sampled_from(sorted(OPTIONS))),
    lead=st.sampled_from([(), (3,), (2, 3)]),
    dtype=st.sampled_from(list(DTYPES)),
    rest=st.booleans(),
    backend=st.sampled_from(["torch", "cpp"]),
)
def test_numpy_torch_and_cpp_recall_the_same_with_any_of_the_options(
    n_tokens, cut, options, lead, dtype, rest, backend
):
    parameters = {"budget": 25, **SIZES, **{name: OPTIONS[name] for name in options}, "centroids_for_rest": rest}
    arrays, query = tokens_of(n_tokens, n_tokens, dtype=dtype, lead=lead), query_of(5, dtype=dtype, lead=lead)
    cuts = [min(cut, n_tokens)]
    expected = filled(reference.RecallCache(**parameters), arrays, cuts)
    ours = filled(fast.RecallCache(**parameters, backend=backend), arrays, cuts, to_torch)
    if expected.clusters is None:
        assert ours.clusters is None
        return
    assert is_same_cache(ours, expected)
    chosen, chosen_here = expected.select_clusters(query), ours.select_clusters(to_torch(query))
    assert_same_bits(chosen_here.taken, chosen.taken)
    assert_same_bits(chosen_here.tokens(ours.clusters), chosen.tokens(expected.clusters))
    *theirs, counts = expected.entries(chosen)
    *mine, counts_here = map(to_numpy, ours.entries(chosen_here))
    assert np.array_equal(counts_here, counts)
    assert all(np.array_equal(a[counts > 0], b[counts > 0]) for a, b in zip(mine, theirs, strict=True))
    output = ours.attend(to_torch(query))
    if "is_per_query_head" in options:
        assert attends_to(output, query, (*theirs, counts))
    else:
        assert attention_agrees(output, to_torch(query), *map(to_torch, (*theirs, counts)))


def test_the_preset_is_what_the_paper_states():
    """A prompt whole in L / 80 clusters, 320 tokens in 4 more, no recent ones but those that wait."""
    cache = fast.RecallCache.as_published(budget=64, seed=3)
    clustering = {"n_sink": 16, "tokens_per_cluster": 80, "segment_size": 320, "prompt_segment_size": None}
    clustering |= {"max_iter": 1000, "is_centred": False, "init_seed": 3}
    recall = {"n_recent": 0, "spread": 0.0, "centroids_for_rest": False}
    recall |= {"is_per_query_head": True, "is_exact_counted": False, "bits": 16}
    assert vars(cache.settings) == {"budget": 64, **clustering, **recall}
    arrays = tokens_of(0, 816 + 320, lead=(1,))
    for token in (816, *range(817, 816 + 320)):
        start = 0 if token == 816 else token - 1
        cache.append(*(to_torch(array[:, start:token]) for array in arrays))
        assert (cache.n_clustered, cache.body.n_clusters) == (800, 10)
    cache.append(*(to_torch(array[:, -1:]) for array in arrays))
    assert (cache.n_clustered, cache.body.n_clusters) == (1120, 14)


@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_the_preset_is_the_same_in_torch_and_rounds_end_when_labels_repeat(backend):
    arrays, query = tokens_of(1, 700, lead=(2,)), query_of(2, lead=(2,))
    expected = filled(reference.RecallCache.as_published(budget=100, seed=7), arrays, [600])
    ours = filled(fast.RecallCache.as_published(budget=100, seed=7, backend=backend), arrays, [600], to_torch)
    assert is_same_cache(ours, expected)
    init = np.array([sample_tokens(584, 8, seed=7, head=head, start=0) for head in range(2)])
    settled, unsettled = (
        reference.kmeans(arrays[0][:, 16:600], n_clusters=8, init=init, max_iter=rounds) for rounds in (10_000, 4)
    )
    assert np.array_equal(settled.labels, expected.clusters.labels)
    assert not np.array_equal(unsettled.labels, expected.clusters.labels)
    chosen = expected.select_clusters(query)
    assert chosen.taken.shape == (2, 4, 8)
    assert (chosen.taken.sum(axis=-1) == 100).all()
    assert_same_bits(ours.select_clusters(to_torch(query)).taken, chosen.taken)
    assert attends_to(ours.attend(to_torch(query)), query, expected.entries(chosen))
    assert not attends_to(ours.attend(to_torch(query)), query[:, ::-1].copy(), expected.entries(chosen))


@pytest.mark.parametrize("package", [reference, fast])
def test_each_query_head_recalls_as_if_it_were_alone(package):
    arrays, query = tokens_of(3, 100), query_of(4)
    convert, back = (to_torch, to_numpy) if package is fast else (np.copy, np.asarray)
    cache = filled(package.RecallCache(**SMALL), arrays, convert=convert)
    together = filled(package.RecallCache(**SMALL | {"is_per_query_head": False}), arrays, convert=convert)
    taken, output = back(cache.select_clusters(convert(query)).taken), back(cache.attend(convert(query)))
    for head in range(4):
        alone = convert(query[..., head : head + 1, :])
        assert np.array_equal(taken[..., head, :], back(together.select_clusters(alone).taken))
        assert output[..., head, :].tobytes() == back(together.attend(alone))[..., 0, :].tobytes()
    assert not np.array_equal(output, back(together.attend(convert(query))))  # wrong twin: one choice for the group


@pytest.mark.parametrize("package", [reference, fast])
def test_a_budget_beside_the_exact_tokens_is_recalled_however_many_these_are(package):
    convert, back = (to_torch, to_numpy) if package is fast else (np.copy, np.asarray)
    arrays, query = tokens_of(5, 60), convert(query_of(6))
    cache, counting = (
        package.RecallCache(**SMALL | {"is_exact_counted": is_counted, "budget": 14}) for is_counted in (False, True)
    )
    cache.append(*(convert(array[..., :40, :]) for array in arrays))
    counting.append(*(convert(array[..., :40, :]) for array in arrays))
    recalled = []
    for token in range(40, 49):
        for one in (cache, counting):
            one.append(*(convert(array[..., token : token + 1, :]) for array in arrays))
        recalled.append([int(back(one.select_clusters(query).taken).sum(axis=-1).max()) for one in (cache, counting)])
        assert (
            back(cache.entries(cache.select_clusters(query))[2]).shape[-1]
            == 14 + 3 + cache.n_seen - 3 - cache.n_clustered
        )
    assert {here for here, _ in recalled} == {14}
    assert len({there for _, there in recalled}) > 1  # wrong twin: sinks and recent tokens take of it
    assert SegmentPlan(1, 16, 1, 8, None, 512, False).segment_size == 320
    assert RecallSettings(1, is_exact_counted=False).segment_size == 320


def test_a_row_of_a_batch_draws_as_if_it_were_alone_and_a_head_does_not():
    arrays = tokens_of(7, 90)
    arrays = [np.repeat(array[:1, :1], 2, axis=0).repeat(3, axis=1) for array in arrays]  # the same tokens everywhere
    for package, convert, back in ((reference, np.copy, np.asarray), (fast, to_torch, to_numpy)):
        labels = back(filled(package.RecallCache(**SMALL), arrays, [50], convert).clusters.labels)
        assert np.array_equal(labels[0], labels[1])
        assert not np.array_equal(labels[0, 0], labels[0, 1])
        other = filled(package.RecallCache(**SMALL | {"init_seed": 6}), arrays, [50], convert)
        assert not np.array_equal(back(other.clusters.labels), labels)


@pytest.mark.parametrize("twin", ["right", "one sample for all heads", "one sample for all segments", "in any order"])
def test_wrong_twins_of_the_sample_are_told_apart(twin, monkeypatch):
    right = body_clusters.sample_tokens

    def wrong(n_tokens, n_drawn, *, seed, heads, starts):
        if twin == "in any order":
            return right(n_tokens, n_drawn, seed=seed, heads=heads, starts=starts).flip(-1)
        heads, starts = (0 * heads, starts) if twin.endswith("heads") else (heads, 0 * starts)
        return right(n_tokens, n_drawn, seed=seed, heads=heads, starts=starts)

    arrays = tokens_of(8, 90)
    expected = filled(reference.RecallCache(**SMALL), arrays, [50])
    if twin != "right":
        monkeypatch.setattr(body_clusters, "sample_tokens", wrong)
    assert is_same_cache(filled(fast.RecallCache(**SMALL), arrays, [50], to_torch), expected) == (twin == "right")


@pytest.mark.parametrize("make", [fast.RecallCache, make_tiered])
def test_rows_may_be_reordered_and_tokens_taken_out(make):
    arrays, query = tokens_of(9, 130), query_of(10)
    cache = filled(make(**SMALL), arrays, [60, 100], to_torch)
    cache.attend(to_torch(query))
    cache.select(torch.tensor([1, 1, 0]))
    cache.crop(25)
    shorter = [array[[1, 1, 0], :, :105] for array in arrays]
    expected = filled(reference.RecallCache(**SMALL), shorter, [60, 100])
    assert is_same_cache(cache, expected)
    assert attends_to(
        cache.attend(to_torch(query[[1, 1, 0]])),
        query[[1, 1, 0]],
        expected.entries(expected.select_clusters(query[[1, 1, 0]])),
    )


@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_two_tiers_fetch_what_any_query_head_takes(backend, tmp_path):
    arrays = tokens_of(11, 200)
    tiered = make_tiered(folder=tmp_path, n_steps=2, backend=backend, **SMALL)
    memory = fast.RecallCache(**SMALL, backend=backend)
    for cache in (tiered, memory):
        filled(cache, [array[..., :150, :] for array in arrays], convert=to_torch)
    asked = 0
    for token in range(150, 200):
        query = to_torch(query_of(token))
        outputs = []
        for cache in (tiered, memory):
            cache.append(*(to_torch(array[..., token : token + 1, :]) for array in arrays))
            outputs.append(cache.attend(query))
        assert torch.equal(*outputs)
        asked += int((memory.select_clusters(query).taken > 0).any(dim=-2).sum())
    assert tiered.statistics.n_asked == asked
    assert 0 < tiered.statistics.n_hits < asked
    preset = TieredRecallCache.as_published(budget=64, seed=2, folder=tmp_path)
    assert (preset.settings, preset.n_steps) == (RecallSettings.as_published(budget=64, seed=2), 1)


def test_kernels_choose_for_each_query_head_too(few_programs):
    arrays, query = tokens_of(12, 80, lead=(2,)), query_of(13, lead=(2,))
    expected = filled(reference.RecallCache(**SMALL), arrays, [50])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ours = filled(fast.RecallCache(**SMALL, backend="triton"), arrays, [50], lambda x: to_torch(x).to(device))
    here = to_torch(query).to(device)
    chosen = expected.select_clusters(query)
    assert_same_bits(ours.clusters.labels.cpu(), expected.clusters.labels)
    assert_same_bits(ours.select_clusters(here).taken.cpu(), chosen.taken)
    assert attends_to(ours.attend(here).cpu(), query, expected.entries(chosen))


@pytest.mark.parametrize("budget", [0, 1.5, True])
def test_the_preset_refuses_with_the_same_words(budget):
    said = set()
    for package in (reference, fast):
        with pytest.raises((ValueError, TypeError), match="budget must be ") as error:
            package.RecallCache.as_published(budget=budget)
        said.add((error.type, str(error.value)))
    assert len(said) == 1


@pytest.mark.parametrize("package", [reference, fast])
def test_an_empty_batch_is_no_error(package):
    convert = to_torch if package is fast else np.copy
    for lead in ((0,), (0, 2), (2, 0)):
        cache = filled(package.RecallCache(**SMALL), tokens_of(14, 40, lead=lead), convert=convert)
        query = convert(query_of(15, lead=lead))
        assert tuple(cache.select_clusters(query).taken.shape) == (*lead, 4, 9)
        assert tuple(cache.attend(query).shape) == (*lead, 4, 16)
