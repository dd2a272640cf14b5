"""Pooled matching by hand, by exact fractions in plain Python, and by SciPy's cosine."""

from fractions import Fraction

import numpy as np
import pytest
from inputs import DTYPES, make_keys
from scipy.spatial.distance import cdist

from kvcluster.reference import chunked_soft_matching
from kvcluster.reference.pooled_matching import compress_entries, pooled_round


def rows(*numbers):
    return np.array(numbers, dtype=np.float32)


def ones(size):
    return np.ones(size, dtype=np.int32)


def test_the_least_similar_matches_of_all_chunks_are_pruned():
    """The matches of the first chunk are perfect, those of the second 0.5 and 0.9: two merges are of the first."""
    keys = rows([1, 0], [2, 0], [0, 1], [0, 3], [1, 0], [1, 1], [1, 2], [-1, 0])
    assert pooled_round(keys, n_merged=2, chunk_size=4).tolist() == [0, 0, 1, 1, 2, 3, 4, 5]
    assert pooled_round(keys, n_merged=3, chunk_size=4).tolist() == [0, 0, 1, 1, 2, 3, 3, 4]
    # wrong twin: the same number of merges in each chunk
    assert chunked_soft_matching(keys, keep_ratio=0.75, chunk_size=4).labels.tolist() == [0, 0, 1, 2, 3, 4, 4, 5]


@pytest.mark.parametrize(
    ("size", "chunk_size", "n_merged", "labels"),
    [
        (8, 4, 3, [0, 0, 0, 1, 2, 2, 3, 4]),  # 0 and 2 join 1, then 4 joins 5
        (8, 4, 4, [0, 0, 0, 1, 2, 2, 2, 3]),
        (8, 2, 2, [0, 0, 1, 1, 2, 3, 4, 5]),
        (5, 3, 2, [0, 0, 0, 1, 2]),  # the last chunk is shorter
        (5, 16, 2, [0, 0, 0, 1, 2]),
    ],
)
def test_of_equal_similarities_the_first_merge(size, chunk_size, n_merged, labels):
    keys = np.ones((size, 2), dtype=np.float32)
    assert pooled_round(keys, n_merged, chunk_size).tolist() == labels
    for is_last in (False, True):  # the wrong twin: the last merge
        counts = compressed_in_fractions(keys, ones(size), size - n_merged, chunk_size, is_last=is_last)[1]
        assert (np.bincount(labels).tolist() == counts) == (not is_last)


def test_an_entry_alone_in_the_last_chunk_stays():
    assert pooled_round(np.ones((5, 2), dtype=np.float32), n_merged=2, chunk_size=2).tolist() == [0, 0, 1, 1, 2]


def test_a_shorter_last_chunk_takes_part():
    """Entries 4 and 5 are a chunk of two, and the only ones that are alike."""
    keys = rows([1, 0], [0, 1], [1, 0], [0, 1], [1, 1], [2, 2])
    assert pooled_round(keys, n_merged=1, chunk_size=4).tolist() == [0, 1, 2, 3, 4, 4]


def test_chunks_are_cut_anew_in_every_step():
    """x x y y | y y x x becomes x y y x, one chunk: its first entry finds the last. In old chunks it would find y."""
    x, y = [1, 0], [0, 1]
    keys, values = rows(x, x, y, y, y, y, x, x), rows([0], [4], [1], [1], [2], [4], [8], [4])
    made = compress_entries(keys, values, ones(8), target=2, chunk_size=4)
    assert [array.tolist() for array in made] == [[y, x], [[2], [4]], [4, 4]]
    halves = [compress_entries(keys[at], values[at], ones(4), target=1, chunk_size=4) for at in (np.s_[:4], np.s_[4:])]
    assert [half[0].tolist() for half in halves] == [[[0.5, 0.5]]] * 2  # wrong twin: each chunk stays by itself


def test_a_step_takes_away_at_most_half():
    keys = make_keys("normal", (13, 4), DTYPES["f32"], seed=0)
    sizes, target = [13], 13
    while target > 1:
        target = max(1, sizes[-1] - sizes[-1] // 2)
        sizes.append(compress_entries(keys, keys, ones(13), target=target, chunk_size=5)[2].shape[-1])
    assert sizes == [13, 7, 4, 2, 1]
    for target in (13, 20):  # nothing to do
        made = compress_entries(keys, keys, ones(13), target=target, chunk_size=5)
        assert made[0].tobytes() == keys.tobytes()


def test_means_are_weighted_by_counts():
    """The key (1 * 4 + 3 * 2) / 4 and the value (1 * 1 + 3 * 5) / 4; then means of two entries of 4 tokens each."""
    keys, values, counts = rows([4, 0], [2, 0], [0, 1]), rows([1], [5], [2]), np.array([1, 3, 4], dtype=np.int32)
    made = compress_entries(keys, values, counts, target=2, chunk_size=2)
    assert [array.tolist() for array in made] == [[[2.5, 0], [0, 1]], [[4], [2]], [4, 4]]
    made = compress_entries(keys, values, counts, target=1, chunk_size=2)
    assert [array.tolist() for array in made] == [[[1.25, 0.5]], [[3]], [8]]
    assert [array.dtype for array in made] == [np.float32, np.float32, np.int32]
    unweighted = compress_entries(keys, values, ones(3), target=2, chunk_size=2)[1]
    assert unweighted.tolist() == [[3], [2]]  # wrong twin


def test_what_merges_is_what_scipys_cosine_puts_first():
    keys = make_keys("normal", (40, 16), DTYPES["f32"], seed=1)
    matches = []
    for first in range(0, 40, 10):
        sources, destinations = np.arange(first, first + 10, 2), np.arange(first + 1, first + 10, 2)
        distances = cdist(keys[sources].astype(np.float64), keys[destinations].astype(np.float64), "cosine")
        nearest = destinations[distances.argmin(axis=1)]
        matches += [*zip(distances.min(axis=1), sources, nearest, strict=True)]
    labels = pooled_round(keys, n_merged=9, chunk_size=10)
    merged = {source for source in range(40) if (labels == labels[source]).sum() > 1 and source % 2 == 0}
    best_first = sorted(matches)
    assert merged == {source for _, source, _ in best_first[:9]}
    assert merged != {source for _, source, _ in best_first[-9:]}  # wrong twin: the most similar are pruned
    assert all(labels[source] == labels[destination] for _, source, destination in best_first[:9])
    assert labels.max() + 1 == 40 - 9


def likeness(a, b):
    """The signed squared cosine, exactly."""
    dot, norms = (
        sum(x * y for x, y in zip(a, b, strict=True)),
        sum(x * x for x in a) * sum(y * y for y in b),
    )
    return dot * abs(dot) / norms if norms else Fraction(0)


def compressed_in_fractions(keys, counts, target, chunk_size, weighs=lambda count: count, is_last=False):
    """Keys and counts after pooled matching: lists of exact numbers, rounded to float32 once in a step."""
    entries = [([*map(Fraction, key.tolist())], int(count)) for key, count in zip(keys, counts, strict=True)]
    sign = -1 if is_last else 1  # of ties, the last
    while len(entries) > target:
        matches = []
        for first in range(0, len(entries), chunk_size):
            chunk = range(first, min(first + chunk_size, len(entries)))
            for source in chunk[::2] if len(chunk) > 1 else ():
                found = {at: likeness(entries[source][0], entries[at][0]) for at in chunk[1::2]}
                destination = min(found, key=lambda at: (-found[at], sign * at))
                matches.append((-found[destination], sign * source, destination))
        n_merged = min(len(entries) // 2, len(entries) - target)
        joins = {sign * place: destination for _, place, destination in sorted(matches)[:n_merged]}
        clusters = [
            [at for at in range(len(entries)) if joins.get(at, at) == stays]
            for stays in range(len(entries))
            if stays not in joins
        ]
        entries = [averaged([entries[at] for at in cluster], weighs) for cluster in clusters]
    return [[float(x) for x in key] for key, _ in entries], [count for _, count in entries]


def averaged(members, weighs):
    """One entry of some: the mean by weight, as a float32 number, and how many tokens they are."""
    weight = sum(weighs(count) for _, count in members)
    sums = [sum(weighs(count) * key[i] for key, count in members) for i in range(len(members[0][0]))]
    return [Fraction(float(np.float32(float(total / weight)))) for total in sums], sum(count for _, count in members)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("chunk_size", [2, 3, 5, 16, 256])
def test_it_is_what_exact_fractions_say(chunk_size, seed):
    rng = np.random.default_rng(seed)
    size, target = 34 + seed, 3 + seed * 4
    keys = rng.integers(-9, 10, (size, 4)).astype(np.float32)
    counts = rng.integers(1, 9, size).astype(np.int32)
    made, _, totals = compress_entries(keys, keys, counts, target=target, chunk_size=chunk_size)
    assert (made.tolist(), totals.tolist()) == compressed_in_fractions(keys, counts, target, chunk_size)
    for wrong in ((keys, counts, target, chunk_size, lambda count: 1), (keys, counts, target, chunk_size + 2)):
        is_one_chunk = chunk_size >= size and len(wrong) == 4
        assert ((made.tolist(), totals.tolist()) == compressed_in_fractions(*wrong)) == is_one_chunk


def test_heads_are_problems_of_their_own():
    keys, values = (make_keys("normal", (2, 3, 31, dim), DTYPES["f32"], seed=dim) for dim in (5, 4))
    counts = np.random.default_rng(2).integers(1, 9, (2, 3, 31)).astype(np.int32)
    together = compress_entries(keys, values, counts, target=9, chunk_size=6)
    for head in np.ndindex(2, 3):
        alone = compress_entries(keys[head], values[head], counts[head], target=9, chunk_size=6)
        assert [array[head].tobytes() for array in together] == [array.tobytes() for array in alone]
        other = compress_entries(keys[head][::-1], values[head], counts[head], target=9, chunk_size=6)
        assert [array[head].tobytes() for array in together] != [array.tobytes() for array in other]  # wrong twin
