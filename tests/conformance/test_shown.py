"""Only what is compared is said to agree; what an implementation does not show or take is listed."""

import types

import numpy as np
import pytest

from kvcluster import reference
from kvcluster.conformance import Implementation, check
from kvcluster.conformance.cases import cases_of
from kvcluster.conformance.suite import UnknownNameError

EVERYTHING = {"keys", "values", "counts", "n_clustered", "nbytes", "bytes_of_count", "n_returned"}
EVERYTHING |= {"all_returned_keys", "all_returned_values", "all_returned_counts"}


class Hiding:
    """A cache of the reference that shows what it must, and nothing else."""

    def __init__(self, **rules):
        self.held = reference.ClusteredCache(**rules)

    def append(self, keys, values):
        self.held.append(keys, values)

    def attend(self, query, *, scale=None):
        return self.held.attend(query, scale=scale)

    n_seen = property(lambda cache: cache.held.n_seen)
    n_stored = property(lambda cache: cache.held.n_stored)


class WrongReturned(Hiding):
    def append(self, keys, values):
        keys, values, counts = self.held.append(keys, values)
        return keys, values + np.float32(1), counts


class WideCounts(Hiding):
    counts = property(lambda cache: cache.held.counts.astype(np.int64))


class WrongBytes(Hiding):
    nbytes = property(lambda cache: cache.held.nbytes + 1)


WRONG = {"all_returned_values": WrongReturned, "bytes_of_count": WideCounts, "nbytes": WrongBytes}


@pytest.fixture
def few_cases(monkeypatch):
    def some(operation, seed):
        return [case for case in cases_of(operation, seed) if case.name in ("normal-prompt-f32", "scale")]

    monkeypatch.setattr("kvcluster.conformance.cases.cases_of", some)


def report_on(cache, **options):
    namespace = types.SimpleNamespace(ClusteredCache=cache)
    return check(Implementation(namespace), only=("ClusteredCache",), has_smallest=False, **options).operations[0]


@pytest.mark.usefixtures("few_cases")
def test_what_is_not_shown_is_listed_and_can_be_required():
    report = report_on(Hiding)
    assert (report.verdict, report.n_failed) == ("agrees in part", 0)
    assert set(report.not_shown) == EVERYTHING
    assert set(report.compared) == {"n_seen", "n_stored", "output"}
    assert report_on(Hiding, require=("output", "n_seen")).verdict == "agrees in part"
    report = report_on(Hiding, require=("counts", "output"))
    assert (report.verdict, report.missing) == ("differs", ["counts"])
    assert report_on(reference.ClusteredCache, require=("counts", "nbytes", "ClusteredCache")).verdict == "agrees"
    with pytest.raises(UnknownNameError, match=r"require must name operations or results .*, got count"):
        report_on(Hiding, require=("count",))


@pytest.mark.usefixtures("few_cases")
@pytest.mark.parametrize("name", WRONG)
def test_what_is_shown_is_compared(name, monkeypatch):
    monkeypatch.setattr("kvcluster.conformance.counterexamples.explain", lambda failures: None)
    found = report_on(WRONG[name])
    assert found.n_failed == found.n_cases == 2
    assert found.counterexample.difference.what == name


def test_deviations_and_members_are_compared_where_they_are_shown():
    case = cases_of("RecallCache", 0)[0]
    outcome = Implementation(reference).answer(case)
    assert {"deviations", "members", "n_clustered"} <= set(outcome.arrays)
    kmeans = Implementation(reference).answer(cases_of("kmeans", 0)[0])
    assert "members" in kmeans.arrays


class WithoutScale(Hiding):
    def attend(self, query):
        return self.held.attend(query)


@pytest.mark.usefixtures("few_cases")
def test_a_cache_that_takes_no_scale_is_not_asked_for_one():
    report = report_on(WithoutScale)
    assert (report.n_cases, report.n_failed, dict(report.skipped)) == (1, 0, {"no parameter scale of attend": 1})


def asked(only, **names):
    return check(Implementation(types.SimpleNamespace(**names)), only=(only,), has_smallest=False).operations[0]


def trusting(array, clustering):
    clustering = reference.Clustering(clustering.labels, clustering.counts)
    try:
        return reference.merge(array, clustering)
    except ValueError:
        return np.zeros((*clustering.counts.shape, array.shape[-1]), np.float32)


def test_who_does_not_refuse_may_say_so():
    assert asked("merge", merge=trusting).verdict == "differs"
    report = asked("merge", merge=trusting, REFUSES=False)
    assert (report.verdict, dict(report.skipped)) == ("agrees", {"REFUSES = False": 4})


def test_who_flushes_may_say_so():
    report = asked("merge", merge=reference.merge, SUBNORMALS=False)
    assert (report.verdict, dict(report.skipped)) == ("agrees", {"SUBNORMALS = False": 3})


def test_what_is_not_implemented_is_not_asked():
    def similarity(a, b):
        if a.dtype == np.float16:
            raise NotImplementedError("not for float16")
        return reference.similarity(a, b)

    report = asked("similarity", similarity=similarity)
    assert (report.verdict, dict(report.skipped)) == ("agrees", {"NotImplementedError not for float16": 8})


def raising(kind, on_shapes):
    def attention(query, keys, values, *, scale=None):
        try:
            return reference.attention(query, keys, values, scale=scale)
        except ValueError as error:
            raise (kind if (keys.shape != values.shape) == on_shapes else ValueError)("no") from error

    return attention


def test_a_runtime_error_refuses_shapes_and_nothing_else():
    assert asked("attention", attention=raising(RuntimeError, on_shapes=True)).verdict == "agrees"
    assert asked("attention", attention=raising(RuntimeError, on_shapes=False)).verdict == "differs"
    assert asked("attention", attention=raising(KeyError, on_shapes=True)).verdict == "differs"


def test_what_is_no_array_is_no_refusal():
    report = asked("merge", merge=lambda array, clustering: None)
    assert report.n_failed == report.n_cases
    assert "NoneType" in report.counterexample.difference.got
