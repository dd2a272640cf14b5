"""The recall cache in two tiers: the outputs of the one in memory, a fast tier that holds what it should, no trace."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from caches import make_tiered
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import DTYPES, make_keys, to_torch

from kvcluster import fast
from kvcluster.fast.memory import fast_tier

PARAMETERS = {"budget": 48, "n_sink": 3, "n_recent": 2, "tokens_per_cluster": 4, "segment_size": 20, "max_iter": 3}
PARAMETERS["prompt_segment_size"] = 32
LEAD, DIM = (2, 3), 16


def tokens_of(seed, n_tokens, dtype="f32"):
    return [to_torch(make_keys("smooth", (*LEAD, n_tokens, DIM), DTYPES[dtype], seed + i)) for i in range(2)]


def query_of(seed, lead=LEAD):
    return to_torch(make_keys("normal", (*lead, 2, DIM), DTYPES["f32"], seed))


def assert_same_cache(cache, expected):
    for name in ("n_seen", "n_stored", "n_clustered", "nbytes"):
        assert getattr(cache, name) == getattr(expected, name), name
    for tier, memory in zip((*cache.stored, cache.keys), (*expected.stored, expected.keys), strict=True):
        assert torch.equal(tier, memory)
    assert torch.equal(cache.clusters.labels, expected.clusters.labels)
    assert torch.equal(cache.clusters.centroids, expected.clusters.centroids)


def filled(tmp_path, **parameters):
    """Two caches of the same 300 tokens: in two tiers, and in memory."""
    keys, values = tokens_of(20, 300)
    caches = make_tiered(folder=tmp_path, **PARAMETERS, **parameters), fast.RecallCache(**PARAMETERS)
    for cache in caches:
        cache.append(keys, values)
    return caches


@settings(max_examples=25)
@given(
    first=st.sampled_from([1, 90]),
    pieces=st.lists(st.sampled_from([1, 1, 1, 2, 19, 64, 130]), min_size=2, max_size=14),
    n_steps=st.integers(1, 4),
    backend=st.sampled_from(["torch", "cpp"]),
    option=st.sampled_from([{}, {"centroids_for_rest": True}, {"prompt_segment_size": 0}]),
    dtype=st.sampled_from(list(DTYPES)),
)
def test_two_tiers_give_the_outputs_of_memory_bit_for_bit(first, pieces, n_steps, backend, option, dtype):
    parameters = {**PARAMETERS, **option, "backend": backend}
    cache, expected = make_tiered(**parameters, n_steps=n_steps), fast.RecallCache(**parameters)
    for seed, n_tokens in enumerate([first, 70, *pieces]):
        keys, values = tokens_of(7 * seed, n_tokens, dtype)
        query = query_of(seed)
        for each in (cache, expected):
            each.append(keys, values)
        assert torch.equal(cache.attend(query), expected.attend(query))
    assert_same_cache(cache, expected)
    order = torch.tensor([1, 1, 0])
    for each in (cache, expected):
        each.select(order)
    query = query_of(99, (3, 3))
    assert torch.equal(cache.attend(query), expected.attend(query))
    assert_same_cache(cache, expected)


@pytest.mark.parametrize("n_steps", [1, 2, 5])
def test_statistics_are_those_of_sets(tmp_path, n_steps):
    """Brute force: sets of (problem, cluster), and a hit is a cluster in one of the last `n_steps` of them."""
    cache, _ = filled(tmp_path, n_steps=n_steps)
    assert np.isnan(cache.statistics.hit_rate)
    asked, n_asked, n_hits, n_evicted, n_moved = [], 0, 0, 0, 0
    for seed in range(40):
        query = query_of(seed // 3)  # each comes three times
        taken = cache.select_clusters(query).taken.flatten(0, -2)
        now = set(map(tuple, (taken > 0).nonzero().tolist()))
        before = set().union(*asked[-n_steps:])
        cache.attend(query)
        asked.append(now)
        counts = cache.clusters.counts.flatten(0, -2)
        n_asked += len(now)
        n_hits += len(now & before)
        n_evicted += len(before - set().union(*asked[-n_steps:]))
        n_moved += sum(int(counts[each]) for each in now - before)
        if seed % 4 == 0:
            cache.append(*tokens_of(seed, 7))  # new clusters now and then
    nbytes_moved = n_moved * 2 * DIM * 4
    assert cache.statistics == fast_tier.TierStatistics(n_asked, n_hits, n_evicted, nbytes_moved)
    assert cache.statistics.hit_rate == n_hits / n_asked
    assert 0 < n_hits < n_asked
    assert n_evicted > 0


@pytest.mark.parametrize("wrong", ["evicted though needed", "never copied", "stale recent tokens"])
def test_same_outputs_wrong_twin_is_told_apart(tmp_path, monkeypatch, wrong):
    cache, expected = filled(tmp_path, n_steps=2)
    right = fast_tier.FastTier.replace

    def replace(tier, taken, counts, n_steps, statistics):
        sizes = right(tier, taken, counts, n_steps, statistics)
        if wrong == "evicted though needed":  # its rows are given to others
            is_kept = (taken[0] > 0) & (tier.first_row >= 0)
            tier.end = tier.end - torch.where(is_kept, counts, 0).sum(dim=1)
        return sizes * 0 if wrong == "never copied" else sizes

    def differs():
        differences = []
        for seed in range(12):
            keys, values = tokens_of(seed, 1)
            for each in (cache, expected):
                each.append(keys, values)
            query = query_of(seed // 2)
            differences.append(not torch.equal(cache.attend(query), expected.attend(query)))
        return any(differences)

    assert not differs()
    if wrong == "stale recent tokens":
        monkeypatch.setattr(
            fast_tier.FastTier, "first_new_exact", lambda tier, _, n_sink: min(tier.n_exact, n_sink + 1)
        )
    else:
        monkeypatch.setattr(fast_tier.FastTier, "replace", replace)
    assert differs()


def test_the_fast_tier_holds_no_more_than_it_needs(tmp_path):
    """Its memory is bounded by budget and steps, not by the tokens seen."""
    cache, _ = filled(tmp_path)
    reserved = []
    for seed in range(30):
        cache.attend(query_of(seed))
        reserved.append(cache.nbytes_reserved - cache.body.nbytes)
        cache.append(*tokens_of(seed, 100))
    largest_cluster = int(cache.clusters.counts.max())
    rows = 2 * (PARAMETERS["budget"] + largest_cluster) + PARAMETERS["budget"]
    assert max(reserved) <= 6 * rows * 2 * DIM * 4
    assert cache.nbytes_slow >= 6 * 3200 * 2 * DIM * 4


@pytest.mark.parametrize("failing", [1, 2], ids=["keys", "values"])
@pytest.mark.parametrize("is_first", [True, False], ids=["first", "later"])
def test_a_full_disk_refuses_the_append_and_nothing_else(tmp_path, monkeypatch, failing, is_first):
    cache, expected = filled(tmp_path)
    if is_first:
        cache, expected = make_tiered(folder=tmp_path, **PARAMETERS), fast.RecallCache(**PARAMETERS)
    else:
        assert torch.equal(cache.attend(query_of(1)), expected.attend(query_of(1)))
    reserve, calls = os.posix_fallocate, []

    def fails(*arguments):
        calls.append(arguments)
        if len(calls) == failing:
            raise OSError(28, "No space left on device")
        reserve(*arguments)

    keys, values = tokens_of(2, 200)
    monkeypatch.setattr(os, "posix_fallocate", fails)
    with pytest.raises(OSError, match=r"No space left on device: the slow tier needs a file of .* bytes") as error:
        cache.append(keys, values)
    assert (error.value.errno, error.value.filename) == (28, str(tmp_path))
    if is_first:
        assert (cache.n_seen, cache.keys, cache.nbytes_slow) == (0, None, 0)
    else:
        assert_same_cache(cache, expected)
        assert torch.equal(cache.attend(query_of(3)), expected.attend(query_of(3)))
        calls.clear()
        with pytest.raises(OSError, match="the slow tier needs a file"):
            cache.select(torch.tensor([0, 0, 1, 1]))
        assert_same_cache(cache, expected)
    for each in (cache, expected):  # there is room again
        each.append(keys, values)
    assert torch.equal(cache.attend(query_of(4)), expected.attend(query_of(4)))
    assert_same_cache(cache, expected)


PROGRAM = """
import resource, sys, torch
from kvcluster.fast.memory.segments import RecallSettings
from kvcluster.fast.tiers import TieredRecallCache
cache = TieredRecallCache(RecallSettings(48, n_sink=3, n_recent=2, segment_size=20, max_iter=1), folder=sys.argv[1])
tokens = torch.arange(300 * 16, dtype=torch.float32).sin().reshape(1, 300, 16)
cache.append(tokens, tokens)
before = cache.attend(tokens[:, :2])
if sys.argv[2] == "limit":
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
    try:
        cache.append(tokens, tokens)
    except OSError as error:
        print(cache.n_seen, torch.equal(before, cache.attend(tokens[:, :2])), error)
else:
    print("ready", flush=True)
    while True:
        cache.append(tokens[:, :50], tokens[:, :50])
        cache.attend(tokens[:, :2])
"""


def start(folder, what):
    return subprocess.Popen([sys.executable, "-c", PROGRAM, folder, what], stdout=subprocess.PIPE, text=True)


def test_a_limit_of_the_system_is_an_error_and_no_signal(tmp_path):
    process = start(tmp_path, "limit")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert output.startswith("300 True [Errno 27] File too large: the slow tier needs a file of ")


def test_a_killed_process_leaves_no_file(tmp_path):
    process = start(tmp_path, "run")
    assert process.stdout.readline() == "ready\n"
    maps = Path(f"/proc/{process.pid}/maps").read_text().splitlines()
    mapped = [line for line in maps if str(tmp_path) in line]
    assert len(mapped) >= 2
    assert all(line.endswith("(deleted)") for line in mapped)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("parameters", "error", "message"),
    [
        ({"n_steps": 0}, ValueError, "n_steps must be at least 1, got 0"),
        ({"n_steps": 1.5}, TypeError, "n_steps must be an integer, got 1.5"),
        ({"folder": "/no/such"}, ValueError, "folder must be an existing folder, got '/no/such'"),
        ({"budget": 3}, ValueError, "budget must be at least"),
        ({"n_tiers": 3}, TypeError, "n_tiers"),
    ],
)
def test_bad_parameters_are_refused(parameters, error, message):
    with pytest.raises(error, match=message):
        make_tiered(**{**PARAMETERS, **parameters})


def test_bad_tensors_are_refused_and_leave_the_cache_as_it_was(tmp_path):
    cache, expected = filled(tmp_path)
    keys, values = tokens_of(5, 4)
    for new_keys, new_values, error, message in (
        (keys.numpy(), values, TypeError, "keys must be a torch tensor, got ndarray"),
        (keys, values[..., :3, :], ValueError, "values must have the leading axes and tokens of keys"),
        (keys * torch.nan, values, ValueError, "keys must be finite"),
        (keys.half(), values.half(), ValueError, "keys must have the dtype of the cache, float32"),
        (keys.to("meta"), values, ValueError, "keys must be on the device of the cache, cpu, got meta"),
    ):
        with pytest.raises(error, match=message):
            cache.append(new_keys, new_values)
    assert_same_cache(cache, expected)
    with pytest.raises(ValueError, match="attend needs at least one appended token"):
        make_tiered(**PARAMETERS).attend(query_of(0))
    with pytest.raises(ValueError, match="backend must be"):
        make_tiered(**PARAMETERS, backend="cuda").append(keys, values)


def test_a_forked_process_cannot_write_into_the_file_of_another(tmp_path):
    cache, expected = filled(tmp_path)
    child = os.fork()
    if child == 0:
        refused = 0
        for use in (
            lambda: cache.append(*tokens_of(1, 4)),
            lambda: cache.attend(query_of(0)),
            lambda: cache.crop(1),
            lambda: cache.select(torch.tensor([0, 1])),
        ):
            try:
                use()
            except RuntimeError as error:
                refused += "must be used by the process that made it" in str(error)
        os._exit(refused)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 4
    assert_same_cache(cache, expected)
