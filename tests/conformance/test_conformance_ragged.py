"""The conformance suite on heads with shares of their own: every mistake is caught and told from the others."""

import types

import numpy as np
import pytest
from mistaken import assert_caught_and_named, failures

from kvcluster import reference
from kvcluster.conformance import Implementation, check
from kvcluster.conformance.cases import cases_of
from kvcluster.conformance.explaining import decisions
from kvcluster.conformance.mistake import Mistake
from kvcluster.conformance.operations import OPERATIONS
from kvcluster.conformance.operations.clustered_cache import replaced_caches
from kvcluster.conformance.operations.ragged_cache import LENGTHS, OF_OTHERS, PLACES, RATIOS, OfSome, replaced
from kvcluster.conformance.recent import ByShare, mistakes_of_chunks, mistakes_of_shares

RAGGED = ("RaggedCache",)
RAGGED_CACHE, CLUSTERED_CACHE = (OPERATIONS[name] for name in ("RaggedCache", "ClusteredCache"))
CHUNKS, SHARES = mistakes_of_chunks(replaced), {mistake.cause for mistake in mistakes_of_shares(replaced)}
TOLD = [(CLUSTERED_CACHE, mistake) for mistake in CLUSTERED_CACHE.mistakes if mistake.cause in SHARES]
TOLD += [(RAGGED_CACHE, mistake) for mistake in (*CHUNKS, *RATIOS, *OF_OTHERS, *LENGTHS, *PLACES)]
TOLD += [(RAGGED_CACHE, mistake) for mistake in RAGGED_CACHE.mistakes if mistake.cause in SHARES]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("operation", "mistake"), TOLD, ids=[f"{of.name}: {mistake.cause.partition(':')[0]}" for of, mistake in TOLD]
)
def test_every_mistake_is_caught_and_told_from_the_others(operation, mistake):
    assert_caught_and_named(operation, mistake)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("operation", "patches"),
    [
        (RAGGED_CACHE, (("", "RaggedCache", OfSome),)),
        (RAGGED_CACHE, replaced(ByShare)),
        (CLUSTERED_CACHE, replaced_caches(ByShare)),
    ],
    ids=["heads", "shares", "shares of ClusteredCache"],
)
def test_what_mistakes_are_made_of_is_right(operation, patches):
    assert failures(operation, Mistake("none", "18.1", patches)) == []


def test_mistakes_have_causes_of_their_own():
    causes = [mistake.cause for mistake in RAGGED_CACHE.mistakes]
    assert len(causes) == len(set(causes))
    assert set(causes) >= SHARES


class HalfOfEachChunk(reference.RaggedCache):
    """All heads keep a half: no known mistake."""

    def __init__(self, *, keep_ratios, chunk_size=256, n_sink=16, n_recent=64):
        rules = {"chunk_size": chunk_size, "n_sink": n_sink, "n_recent": n_recent}
        super().__init__(keep_ratios=[0.5] * len(keep_ratios), **rules)


@pytest.mark.slow
def test_a_counterexample_is_small_and_says_what_each_head_keeps():
    report = check(Implementation(types.SimpleNamespace(RaggedCache=HalfOfEachChunk)), only=RAGGED).operations[0]
    skipped = {reason.split(",")[0] for reason in report.skipped}
    assert skipped == {f"no parameter {name}" for name in ("method", "recent_share", "bits")}
    found = report.counterexample
    assert (found.difference.what, found.rule) == ("lengths", "18")
    assert found.cause.startswith("another algorithm or rule: lengths differ in ")
    assert found.case.arrays["keys"].size <= 20
    told = decisions(found.case)
    assert told[0].startswith(f"{found.expected['n_seen']} tokens are seen: ")
    assert len(told) == 1 + len(found.case.parameters["keep_ratios"])


def test_decisions_are_those_of_the_reference():
    cases = {case.name: case for case in cases_of("RaggedCache", 0)}
    assert decisions(cases["alike-in-entries"]) == [
        "120 tokens are seen: 10 chunks of 10 are clustered, in all heads",
        *(f"head {head}: a chunk becomes 4 entries; 60 entries in all" for head in range(3)),
    ]


class WithNoise(reference.RaggedCache):
    """Ones in place of keys and values of entries with a count of at most `MOST`: of none."""

    MOST = 0

    def entries(self):
        made = super().entries()
        if made is None:
            return None
        *arrays, counts = made
        return *(np.where(counts[..., None] <= self.MOST, np.ones_like(array), array) for array in arrays), counts


class WithNoiseInEntries(WithNoise):
    """The wrong twin."""

    MOST = 1


@pytest.mark.slow
@pytest.mark.parametrize(("cache", "is_right"), [(WithNoise, True), (WithNoiseInEntries, False)])
def test_what_stands_where_no_entry_is_does_not_matter(cache, is_right):
    namespace = types.SimpleNamespace(RaggedCache=cache, Distinctive=reference.Distinctive)
    assert check(Implementation(namespace), only=RAGGED, has_smallest=False).agrees == is_right


class WithoutEntries:
    """A cache that does not show what it holds."""

    def __init__(self, *, keep_ratios, **rules):
        self.held = reference.RaggedCache(keep_ratios=self.changed(keep_ratios), **rules)

    def changed(self, ratios):
        return ratios

    def append(self, keys, values):
        self.held.append(keys, values)

    def attend(self, query, *, scale=None):
        return self.held.attend(query, scale=scale)

    @property
    def n_seen(self):
        return self.held.n_seen

    @property
    def lengths(self):
        return self.held.lengths


class BackwardsWithoutEntries(WithoutEntries):
    def changed(self, ratios):
        return ratios[::-1] if isinstance(ratios, tuple) else ratios


@pytest.mark.slow
def test_who_shows_no_entries_is_asked_for_lengths_and_attention():
    def found_in(cache):
        namespace = types.SimpleNamespace(RaggedCache=cache, Distinctive=reference.Distinctive)
        return check(Implementation(namespace), only=RAGGED, has_smallest=False).operations[0]

    report = found_in(WithoutEntries)
    assert (report.verdict, report.skipped) == ("agrees in part", {})
    assert found_in(BackwardsWithoutEntries).counterexample.cause.startswith("keep_ratios are read from the last")
