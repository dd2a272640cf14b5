"""The conformance suite on `ChelseaCache` and whole heads: every known mistake is caught and told from the others."""

import types

import pytest
from mistaken import assert_caught_and_named, failures

from kvcluster import reference
from kvcluster.conformance import Implementation, check
from kvcluster.conformance.cases import cases_of
from kvcluster.conformance.explaining import decisions
from kvcluster.conformance.mistake import Mistake
from kvcluster.conformance.operations import OPERATIONS
from kvcluster.conformance.operations.chelsea_cache import Ruled, replaced_cache
from kvcluster.conformance.pooling import POOLING, Pooling, compressed_by
from kvcluster.conformance.whole_heads import WHOLE_HEADS

CHELSEA, CLUSTERED = (OPERATIONS[name] for name in ("ChelseaCache", "ClusteredCache"))
IN_CHELSEA = [mistake for mistake in CHELSEA.mistakes if "similarities are cosines" not in mistake.cause]  # same order
IN_CLUSTERED = [*WHOLE_HEADS, *(mistake for mistake in CLUSTERED.mistakes if "whole heads have a say" in mistake.cause)]
BOTH = [(CHELSEA, mistake) for mistake in IN_CHELSEA] + [(CLUSTERED, mistake) for mistake in IN_CLUSTERED]
NAMES = [f"{operation.name}: {mistake.cause.partition(':')[0]}" for operation, mistake in BOTH]


@pytest.mark.slow
@pytest.mark.parametrize(("operation", "mistake"), BOTH, ids=NAMES)
def test_every_mistake_is_caught_and_told_from_the_others(operation, mistake):
    assert_caught_and_named(operation, mistake)


@pytest.mark.slow
@pytest.mark.parametrize("patches", [compressed_by(Pooling), replaced_cache(Ruled)], ids=["steps", "rules"])
def test_what_mistakes_are_made_of_is_right(patches):
    assert failures(CHELSEA, Mistake("none", "17.1", patches)) == []


def test_mistakes_have_causes_of_their_own():
    for operation in (CHELSEA, CLUSTERED):
        causes = [mistake.cause for mistake in operation.mistakes]
        assert len(causes) == len(set(causes))
    assert len(POOLING) == 15


def without(name):
    return types.SimpleNamespace(**{each: getattr(reference, each) for each in reference.__all__ if each != name})


def test_who_has_no_such_cache_is_not_asked():
    report = check(Implementation(without("ChelseaCache")), only=("alternating_partition", "ChelseaCache"))
    assert report.agrees
    verdicts = [(each.verdict, set(each.skipped)) for each in report.operations]
    assert verdicts == [("agrees", set()), ("not checked", {"no such name"})]


class WithoutWholeHeads(reference.ChelseaCache):
    def __init__(self, *, ratio, max_new_tokens, n_prompt=None, interval=64, chunk_size=256, n_sink=16, n_recent=64):
        rules = {"n_prompt": n_prompt, "interval": interval, "chunk_size": chunk_size}
        super().__init__(ratio=ratio, max_new_tokens=max_new_tokens, n_sink=n_sink, n_recent=n_recent, **rules)


class ReturnsWhatIsLeft(reference.ChelseaCache):
    def append(self, keys, values):
        super().append(keys, values)
        return self.entries()


class HalfAsOften(WithoutWholeHeads):
    """Twice the interval: no known mistake."""

    def __init__(self, *, interval=64, **rules):
        super().__init__(**rules, interval=2 * interval + 1)


def found_in(cache, **rules):
    return check(Implementation(types.SimpleNamespace(ChelseaCache=cache)), only=("ChelseaCache",), **rules).operations[
        0
    ]


@pytest.mark.slow
def test_who_has_no_whole_heads_passes_the_rest():
    report = found_in(WithoutWholeHeads)
    assert (report.verdict, set(report.skipped)) == ("agrees", {"no parameter whole_heads"})
    assert report.n_cases > 2 * report.skipped.total()


@pytest.mark.slow
def test_entries_after_the_compression_are_not_what_append_returns():
    found = found_in(ReturnsWhatIsLeft, has_smallest=False).counterexample
    assert found.cause.startswith("append returns the entries after its compression")
    assert found.rule == "17.11"


@pytest.mark.slow
def test_a_counterexample_is_small_and_says_what_is_compressed():
    found = found_in(HalfAsOften).counterexample
    assert found.cause.startswith("another algorithm or rule: ")
    assert found.rule == "17"
    assert found.case.arrays["keys"].size <= 30
    told = decisions(found.case)
    assert any(line.startswith("the budget is ") for line in told)
    assert any("a step from" in line for line in told)
    assert any("matches destination" in line and line.endswith(("it merges", "it stays")) for line in told)


def test_decisions_are_those_of_the_reference():
    case = next(case for case in cases_of("ChelseaCache", 0) if case.name == "equal-keys")
    told = decisions(case)
    assert told[:3] == [
        "the budget is 22 entries, and 6 more are let grow",
        "50 entries are stored: entries 3 to 39 become 9",
        "a step from 37 entries, of which 18 merge, in chunks of 8:",
    ]
    second = next(place for place, line in enumerate(told[3:], 3) if line.startswith("a step from 19 entries"))
    assert sum(line.endswith("it merges") for line in told[3:second]) == 18
    assert sum(line.endswith("it merges") for line in told[second:]) < 18 + 9  # 9 and 1, and the second compression
