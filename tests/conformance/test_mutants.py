"""Every mutant answers wrongly in the operations that it names, and in no other one; the fast path answers rightly."""

import dataclasses
import functools
import itertools

import mutants
import numpy as np
import pytest
from agreement import attention_agrees
from inputs import DTYPES, make_keys, to_numpy, to_torch

from kvcluster import fast, reference
from kvcluster.reference.recall import mean_deviations, mean_of_members, recalled_entries

pytestmark = pytest.mark.slow

# kind and dtype of keys, keep_ratio, chunk_size and how many tokens: chunks alone, or some tokens more
INPUTS = [
    ("signs", "f32", 0.6, 16, 40),
    ("near_ties", "f32", 0.1, 16, 80),
    ("duplicates", "f32", 0.2, 16, 40),
    ("zeros", "f16", 0.28, 25, 60),  # of which 8 entries are kept: the float64 product is above 7
    ("normal", "f32", 0.1, 32, 200),
    ("near_ties", "bf16", 0.25, 32, 72),
]
RECALLS = [
    {"tokens_per_cluster": 3, "max_iter": 2},
    {"tokens_per_cluster": 1, "prompt_segment_size": 0},
    {"tokens_per_cluster": 3, "centroids_for_rest": True, "max_iter": 1, "spread": 0.25},
    {"tokens_per_cluster": 3, "init_seed": 5, "is_per_query_head": True, "is_exact_counted": False, "max_iter": 3},
]


def tokens(kind, dtype, n_tokens):
    """Query, keys and values. Sums of float32 values depend on their order; among zeros there are negative ones."""
    made = (("signs" if kind == "signs" else "normal", 3), (kind, n_tokens), ("normal", n_tokens))
    query, keys, values = (make_keys(of, (2, n, 16), DTYPES[dtype], seed=n + len(of)) for of, n in made)
    if dtype == "f32":
        values[..., 0] = np.random.default_rng(1).choice([1, 1e30, -1e30], values.shape[:-1])
    if kind == "zeros":
        keys[..., 3] = -0.0
    return query, keys, values


def to_fast(made):
    """What the reference takes or made, as the fast path takes it."""
    if dataclasses.is_dataclass(made):
        return getattr(fast, type(made).__name__)(*map(to_fast, vars(made).values()))
    return to_torch(made) if isinstance(made, np.ndarray) else made


def same(ours, expected):
    """Numbers and arrays, alone or in tuples and dataclasses, have the same bits."""
    if dataclasses.is_dataclass(expected):
        return all(same(getattr(ours, name), array) for name, array in vars(expected).items())
    if isinstance(expected, tuple) and isinstance(ours, tuple):
        return all(itertools.starmap(same, zip(ours, expected, strict=True)))
    if not isinstance(expected, np.ndarray):
        return ours == expected
    here = to_numpy(ours.contiguous())
    return (here.shape, here.dtype, here.tobytes()) == (expected.shape, expected.dtype, expected.tobytes())


def same_answer(name, *arguments, **parameters):
    """A question: does the function answer as the reference does?"""
    expected = getattr(reference, name)(*arguments, **parameters)
    here, named = [*map(to_fast, arguments)], {key: to_fast(value) for key, value in parameters.items()}
    return name, lambda: same(getattr(fast, name)(*here, **named), expected)


def same_attention(name, entries, *arguments, **parameters):
    """The same question within the bound; right is attention to `entries`: keys, values and counts."""
    here, oracle, scale = [*map(to_fast, arguments)], [*map(to_torch, (arguments[0], *entries))], parameters["scale"]
    return name, lambda: attention_agrees(getattr(fast, name)(*here, **parameters), *oracle, scale=scale)


def same_cache(name, query, keys, values, cuts, scale, **parameters):
    """The same of tokens that arrive in pieces: what is returned, what is held, attention to it."""
    expected = getattr(reference, name)(**parameters)
    pieces = [np.s_[:, start:stop] for start, stop in itertools.pairwise([0, *cuts, keys.shape[1]])]
    returned = [expected.append(keys[at], values[at]) for at in pieces]
    arriving = [(to_torch(keys[at]), to_torch(values[at])) for at in pieces]
    recalls = name == "RecallCache"
    selected = expected.select_clusters(query) if recalls else None
    entries = expected.entries(selected) if recalls else (expected.keys, expected.values, expected.counts)
    parts = ["n_seen", "n_stored", "n_clustered", "keys", "values"]
    parts += ["clusters", "deviations"] if recalls else ["counts"]
    has_own_entries = parameters.get("is_per_query_head", False)  # each query head

    def is_same():
        ours, here = getattr(fast, name)(**parameters), to_torch(query)
        if not all(same(ours.append(*new), then) for new, then in zip(arriving, returned, strict=True)):
            return False
        pair = ours.attend(here, scale=scale), here
        return (
            all(same(getattr(ours, part), getattr(expected, part)) for part in parts)
            and (not recalls or same(ours.select_clusters(here), selected))
            and attention_agrees(
                *(x.unsqueeze(-2) if has_own_entries else x for x in pair), *map(to_torch, entries), scale=scale
            )
        )

    return name, is_same


@functools.cache
def questions():
    """(input, (operation, whether it is right)) of all public functions and classes."""
    asked = [("sizes", same_answer("alternating_partition", size)) for size in (1, 6, 7)]
    for kind, dtype, *rest in INPUTS:
        asked += [(f"{kind} {dtype}", one) for one in questions_about(*tokens(kind, dtype, rest[-1]), *rest)]
    return asked


def questions_about(query, keys, values, keep_ratio, chunk_size, n_tokens):
    matching, scale = {"keep_ratio": keep_ratio, "chunk_size": chunk_size}, 0.7 if n_tokens % 3 else None
    large = np.random.default_rng(5).integers(2000, 9000, keys.shape[:-1])
    yield same_answer("similarity", keys, keys)
    yield same_attention("attention", (keys, values, large // large), query, keys, values, scale=scale)
    yield same_attention("clustered_attention", (keys, values, large), query, keys, values, large, scale=scale)
    yield same_answer("chunked_soft_matching", keys, **matching)
    clustering = reference.chunked_soft_matching(keys, **matching)
    yield same_answer("merge", keys, clustering)
    yield same_answer("merge", values, clustering)
    for cuts, n_sink, n_recent in (([7], 3, 5), (range(1, n_tokens), 0, 20)):
        sizes = {"n_sink": n_sink, "n_recent": n_recent}
        yield same_cache("ClusteredCache", query, keys, values, cuts, scale, **matching, **sizes)
    for n_clusters, max_iter in ((n_tokens, 3), (n_tokens // 4, 1), (n_tokens // 4, 2)):
        yield same_answer("kmeans", keys, n_clusters=n_clusters, max_iter=max_iter)
        clusters = reference.kmeans(keys, n_clusters=n_clusters, max_iter=max_iter)
        scored, deviations = (query, clusters.centroids, clusters.counts), mean_deviations(keys, clusters)
        yield same_answer("select_clusters", *scored, budget=13)
        yield same_answer("select_clusters", *scored, budget=13, deviations=deviations)
        chosen = reference.select_clusters(*scored, budget=13, deviations=deviations)
        for rest in (False, True):
            means = mean_of_members(values, clusters) if rest else None
            entries = recalled_entries(keys, values, clusters, chosen, means)
            by = {"budget": 13, "scale": scale, "centroids_for_rest": rest}
            yield same_attention("recall_attention", entries, query, keys, values, clusters, **by)
    sizes = {"budget": 23, "n_sink": 3, "segment_size": 8}
    for more in RECALLS:
        yield same_cache("RecallCache", query, keys, values, [30], scale, **sizes, **more)


def wrong_answers():
    return {(operation, of) for of, (operation, is_right) in questions() if not is_right()}


def test_the_fast_path_is_right():
    assert wrong_answers() == set()


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=lambda mutant: mutant.name)
def test_mutant_is_wrong_where_it_says(mutant, monkeypatch):
    mutant.patch(monkeypatch)
    assert {operation for operation, _ in wrong_answers()} == set(mutant.operations)
