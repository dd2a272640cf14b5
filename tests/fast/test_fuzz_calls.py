"""Thousands of calls drawn at random: the reference and the fast path give the same bits, or refuse alike."""

import os
from collections import Counter

import numpy as np
import pytest
import torch
from fuzzed import CALLS, case_of, difference, in_fast, in_reference
from fuzzed_mistakes import N_KINDS

from kvcluster import fast, reference
from kvcluster.fast import arguments
from kvcluster.fast.cpu.compiling import pointers

N_CALLS = 320  # of a block: every operation twenty times
N_BLOCKS = 300 if os.environ.get("KVCLUSTER_SOAK") else 7
NOT_CALLED = {"Clustering", "Clusters", "Quantized", "Selection"}  # what calls return
WITHIN = {"Attended", "BoundedCache", "Distinctive", "SoftMatching", "dequantize"}  # called within other calls


def differing(calls):
    """How many calls were answered and refused, and what differs."""
    counted, found = Counter(), []
    for number in calls:
        case = case_of(number)
        right = in_reference(case)
        counted["answered" if right.error is None else "refused"] += 1
        different = difference(case, in_fast(case), right)
        if different is not None:
            found.append(f"{case.operation}, {case.name}: {different}")
    return counted, found


@pytest.mark.parametrize("block", [0, *(pytest.param(block, marks=pytest.mark.slow) for block in range(1, N_BLOCKS))])
def test_both_packages_answer_and_refuse_alike(block, record_property):
    counted, found = differing(range(block * N_CALLS, (block + 1) * N_CALLS))
    assert found == []
    assert min(counted.values()) > N_CALLS / 8
    record_property("calls", dict(counted))


def test_every_public_name_is_called_and_wrong_arguments_are_of_many_kinds():
    for package in (reference, fast):
        assert set(package.__all__) == {*CALLS, *NOT_CALLED, *WITHIN}
    assert N_BLOCKS * N_CALLS >= 2000
    assert N_KINDS >= 60


def test_a_batch_of_no_rows_is_recalled_from_in_both_packages():
    keys = np.ones((0, 2, 30, 16), np.float32)
    found = []
    for package, convert in ((reference, np.copy), (fast, torch.from_numpy)):
        query, array = convert(keys[..., :1, :]), convert(keys)
        clusters = package.kmeans(array, n_clusters=3)
        found.append(package.recall_attention(query, array, array, clusters, budget=5).shape)
        for options in ({}, {"centroids_for_rest": True}):
            cache = package.RecallCache(budget=20, n_sink=2, segment_size=9, **options)
            cache.append(array, array)
            found += [cache.attend(query).shape, cache.clusters.labels.shape[:2]]
    assert {tuple(shape) for shape in found} == {(0, 2, 1, 16), (0, 2)}


def test_negated_views_of_queries_are_read_with_their_sign():
    keys, queries = torch.randn(40, 16), torch.randn(2, 3, 16)
    rules = {"keep_ratio": 0.3, "chunk_size": 20, "share": 1.0}
    expected = fast.attended_matching(keys, keys, queries, **rules)
    made = fast.attended_matching(keys, keys, torch._neg_view(-queries), **rules)
    assert torch.equal(made.labels, expected.labels)


def test_an_array_lives_as_long_as_what_points_to_it():
    [pointer] = pointers(torch.arange(5))
    assert torch.equal(pointer.array, torch.arange(5))
    assert pointer.value == pointer.array.data_ptr()


def test_wrong_twin_that_refuses_in_other_words_is_found(monkeypatch):
    right = arguments.check_finite

    def in_other_words(name, array):
        try:
            right(name, array)
        except ValueError as error:
            raise ValueError(f"{error}!") from error

    monkeypatch.setattr(arguments, "check_finite", in_other_words)
    assert differing(range(N_CALLS))[1]


def test_wrong_twin_that_forgets_a_count_is_found(monkeypatch):
    right = reference.kmeans
    monkeypatch.setattr(reference, "kmeans", lambda keys, **rules: right(keys, **rules | {"max_iter": 1}))
    assert differing(range(9, N_CALLS, len(CALLS)))[1]
