"""Partition, matching and merging: by hand, by their identities, and fast against reference to the last bit."""

import dataclasses

import numpy as np
import pytest
import torch
from agreement import assert_same_bits
from hypothesis import given
from hypothesis import strategies as st
from inputs import DTYPES, KINDS, make_keys, slowly, to_torch
from products import prefer_the_last

from kvcluster import fast, reference
from kvcluster.fast.exact import chunks
from kvcluster.fast.plain import soft_matching


@pytest.mark.parametrize("size", [0, 1, 2, 7, 64])
def test_alternating_partition_splits_in_even_and_odd(size):
    sources, destinations = reference.alternating_partition(size)
    assert sources.tolist() == list(range(0, size, 2))
    assert destinations.tolist() == list(range(1, size, 2))
    for ours, theirs in zip(fast.alternating_partition(size), (sources, destinations), strict=True):
        assert_same_bits(ours, theirs)


def matched(keys, **parameters):
    """Labels of a chunk given as a list of keys, by reference and fast path, which must agree."""
    keys = np.array(keys, dtype=np.float32)
    clustering = reference.chunked_soft_matching(keys, chunk_size=len(keys), **parameters)
    for backend in ("torch", "cpp"):
        ours = fast.chunked_soft_matching(to_torch(keys), chunk_size=len(keys), **parameters, backend=backend)
        assert_same_bits(ours.labels, clustering.labels)
    return clustering.labels.tolist()


def test_matching_by_hand_several_sources_join_one_destination():
    """Sources 0, 2 and 4 all point to destination 1; entries keep their order."""
    assert matched([[1, 0], [1, 0], [1, 0], [0, 1], [1, 0], [0, -1]], keep_ratio=0.5) == [0, 0, 0, 1, 0, 2]


def test_matching_by_hand_ties_go_to_the_smallest_index():
    """All keys equal: every source takes destination 1, and of equal matches sources 0 and 2 merge before 4."""
    assert matched([[1, 0]] * 6, keep_ratio=2 / 3) == [0, 0, 0, 1, 2, 3]


def test_matching_by_hand_in_two_rounds():
    """Source 6 ties between destinations 3 and 7; in round 2, sources 0 and 2 both tie for 1 and only one may merge."""
    keys = [[1, 0], [1, 0], [0, 1], [0, 1], [-1, 0], [-1, 0], [0, 1], [0, 1]]
    assert matched(keys, keep_ratio=0.5) == [0, 0, 1, 1, 2, 2, 1, 3]
    assert matched(keys, keep_ratio=0.375) == [0, 0, 0, 0, 1, 1, 0, 2]


def test_matching_direction_counts_not_length():
    assert matched([[1, 0], [100, 0], [0, 1], [0, 100]], keep_ratio=0.5) == [0, 0, 1, 1]


def test_opposite_keys_are_the_least_alike():
    """The square keeps its sign: source 0 prefers an orthogonal destination to its opposite."""
    assert matched([[1, 0], [-1, 0], [0, 0.5], [0, 1]], keep_ratio=0.75) == [0, 1, 2, 2]
    assert matched([[1, 0], [-1, 0], [-1, 0.1], [0, 1]], keep_ratio=0.5) == [1, 0, 0, 1]


@given(
    tokens=st.integers(0, 200),
    chunk_size=st.integers(1, 70),
    keep_ratio=st.floats(0.01, 1),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 1000),
)
def test_clusterings_are_partitions(tokens, chunk_size, keep_ratio, kind, seed):
    """Labels name every entry, counts are their numbers, sum to the tokens, and each chunk keeps its share."""
    keys = make_keys(kind, (2, tokens, 8), DTYPES["f32"], seed)
    clustering = reference.chunked_soft_matching(keys, keep_ratio=keep_ratio, chunk_size=chunk_size)
    chunks, rest = divmod(tokens, chunk_size)
    target = int(np.ceil(keep_ratio * chunk_size))
    assert clustering.counts.shape == (2, chunks * target + rest)
    for head in range(2):
        members = np.bincount(clustering.labels[head], minlength=chunks * target + rest)
        assert np.array_equal(members, clustering.counts[head])
        assert (clustering.counts[head] >= 1).all()
        for chunk in range(chunks):
            labels = clustering.labels[head, chunk * chunk_size : (chunk + 1) * chunk_size]
            assert set(labels) == set(range(chunk * target, (chunk + 1) * target))


@given(seed=st.integers(0, 1000), tokens=st.integers(1, 100))
def test_keep_ratio_one_changes_no_bit(seed, tokens):
    keys = -np.abs(make_keys("zeros", (tokens, 8), DTYPES["f32"], seed))  # has negative zeros
    clustering = reference.chunked_soft_matching(keys, keep_ratio=1, chunk_size=16)
    assert reference.merge(keys, clustering).tobytes() == keys.tobytes()


def test_heads_and_chunks_are_problems_of_their_own():
    keys = make_keys("normal", (2, 3, 130, 16), DTYPES["f32"], seed=0)
    whole = reference.chunked_soft_matching(keys, keep_ratio=0.3, chunk_size=64)
    target = 20
    for batch, head, chunk in np.ndindex(2, 3, 2):
        span = slice(64 * chunk, 64 * chunk + 64)
        alone = reference.chunked_soft_matching(keys[batch, head, span], keep_ratio=0.3, chunk_size=64)
        assert np.array_equal(whole.labels[batch, head, span], alone.labels + chunk * target)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(1, 64), (2, 64), (63, 80), (2, 64, 64), (2, 3, 65, 80), slowly((1, 1000, 128)), (3, 0, 8)]
)
def test_fast_matching_and_merging_have_the_same_bits(shape, dtype, kind):
    keys = make_keys(kind, shape, DTYPES[dtype], seed=7)
    values = make_keys("normal", (*shape[:-1], 5), DTYPES[dtype], seed=8)
    for keep_ratio in (0.5, 0.25, 0.2):
        for chunk_size in (64, 17):
            expected = reference.chunked_soft_matching(keys, keep_ratio=keep_ratio, chunk_size=chunk_size)
            means = [reference.merge(array, expected) for array in (keys, values)]
            for backend in ("torch", "cpp"):
                ours = fast.chunked_soft_matching(
                    to_torch(keys), keep_ratio=keep_ratio, chunk_size=chunk_size, backend=backend
                )
                assert_same_bits(ours.labels, expected.labels)
                assert_same_bits(ours.counts, expected.counts)
                for array, mean in zip((keys, values), means, strict=True):
                    assert_same_bits(fast.merge(to_torch(array), ours, backend=backend), mean)


def test_strided_and_split_work_give_the_same_bits(monkeypatch):
    """Transposed tensors, and chunks matched one at a time instead of together."""
    keys = make_keys("smooth", (2, 3, 256, 32), DTYPES["f16"], seed=9)
    expected = reference.chunked_soft_matching(keys, keep_ratio=0.25)
    strided = to_torch(keys.transpose(0, 2, 1, 3)).transpose(1, 2)
    monkeypatch.setattr(soft_matching, "WORKING_BYTES", 1)
    ours = fast.chunked_soft_matching(strided, keep_ratio=0.25, backend="torch")
    assert_same_bits(ours.labels, expected.labels)


def labels_of_torch(keys, keep_ratio):
    """By plain torch, which is what the mistakes below are made in."""
    return fast.chunked_soft_matching(to_torch(keys), keep_ratio=keep_ratio, backend="torch").labels


def test_autocast_and_imprecise_products_change_no_bit():
    keys = make_keys("smooth", (2, 640, 64), DTYPES["f32"], seed=12)
    expected = reference.chunked_soft_matching(keys, keep_ratio=0.25)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same_bits(labels_of_torch(keys, 0.25), expected.labels)
    torch.set_float32_matmul_precision("medium")
    try:
        assert_same_bits(labels_of_torch(keys, 0.25), expected.labels)
    finally:
        torch.set_float32_matmul_precision("highest")


def swapped_partition(size):
    entries = torch.arange(size)
    return (entries[1::2], entries[0::2]) if size % 2 == 0 else (entries[0::2], entries[1::2])


def float32_matches(sources, destinations):
    """The filter alone, believed."""
    filtered = fast.exact.similarity.certified_matches(sources, destinations)
    unit = [torch.nn.functional.normalize(keys, dim=-1) for keys in (sources, destinations)]
    return dataclasses.replace(filtered, destination=(unit[0] @ unit[1].mT).argmax(dim=-1))


def last_of_ties(sources, destinations):
    filtered = fast.exact.similarity.certified_matches(sources, destinations.flip(1))
    return dataclasses.replace(filtered, destination=destinations.shape[1] - 1 - filtered.destination)


def best_by_cosine_alone(matches, sources, destinations, n_top):
    return matches.cosine.argsort(dim=-1, descending=True, stable=True)[:, :n_top]


@pytest.mark.parametrize(
    ("name", "twin", "kind"),
    [
        ("alternating_halves", swapped_partition, "normal"),
        ("certified_matches", float32_matches, "near_ties"),
        ("certified_matches", last_of_ties, "signs"),
        ("certified_top", best_by_cosine_alone, "near_ties"),
    ],
    ids=["source and destination swapped", "float32 matches", "ties to the largest", "float32 cut"],
)
def test_wrong_twins_of_matching_are_told_apart(monkeypatch, name, twin, kind):
    keys = make_keys(kind, (640, 64), DTYPES["f32"], seed=10)
    expected = reference.chunked_soft_matching(keys, keep_ratio=0.2).labels
    if kind == "near_ties":
        prefer_the_last(monkeypatch)
    assert_same_bits(labels_of_torch(keys, 0.2), expected)
    monkeypatch.setattr(chunks if name == "alternating_halves" else soft_matching, name, twin)
    with pytest.raises(AssertionError):
        assert_same_bits(labels_of_torch(keys, 0.2), expected)


def test_members_are_added_in_ascending_order():
    """1 + 1e30 - 1e30 is 0 in float64, the other way round it is 1."""
    keys = np.array([[1], [1e30], [-1e30], [7]], dtype=np.float32)
    labels, counts = np.array([0, 0, 0, 1]), np.array([3, 1])
    assert reference.merge(keys, reference.Clustering(labels, counts)).tolist() == [[0], [7]]
    for backend in ("torch", "cpp"):
        ours = fast.merge(to_torch(keys), fast.Clustering(to_torch(labels), to_torch(counts)), backend=backend)
        assert_same_bits(ours, reference.merge(keys, reference.Clustering(labels, counts)))
    backwards = fast.merge(to_torch(keys).flip(0), fast.Clustering(to_torch(labels).flip(0), to_torch(counts)))
    assert backwards[0].item() != 0  # wrong twin


def test_wrong_twins_of_merging_are_told_apart():
    keys = to_torch(make_keys("normal", (256, 64), DTYPES["f32"], seed=11))
    clustering = fast.chunked_soft_matching(keys, keep_ratio=0.2)
    expected = reference.merge(keys.numpy(), reference.Clustering(clustering.labels.numpy(), clustering.counts.numpy()))
    one_hot = torch.nn.functional.one_hot(clustering.labels).T.float()
    twins = {
        "summed in float32": (one_hot @ keys) / clustering.counts[:, None],
        "divided before it is summed": one_hot @ (keys / clustering.counts[clustering.labels][:, None]),
        "the first member instead of the mean": keys[one_hot.argmax(dim=1)],
    }
    assert_same_bits(fast.merge(keys, clustering), expected)
    for twin in twins.values():
        with pytest.raises(AssertionError):
            assert_same_bits(twin, expected)
