"""The conformance suite on codes of few bits and caches of such entries: every mistake is told from the others."""

import types

import mistaken
import ml_dtypes
import numpy as np
import pytest
from mistaken import assert_caught_and_named, failures

from kvcluster import reference
from kvcluster.conformance import Implementation, check
from kvcluster.conformance.bits import ByBlocks, mistakes_of_bits, with_any_group
from kvcluster.conformance.cases import cases_of
from kvcluster.conformance.comparing import compare
from kvcluster.conformance.explaining import decisions, without_sizes
from kvcluster.conformance.mistake import Mistake
from kvcluster.conformance.operations import OPERATIONS, clustered_cache, ragged_cache
from kvcluster.conformance.operations.quantize import QUANTIZING, everywhere
from kvcluster.conformance.quantizing import Quantizing
from kvcluster.conformance.recent_tokens import mistakes_of_exact

QUANTIZE, CLUSTERED, RAGGED = (OPERATIONS[name] for name in ("quantize", "ClusteredCache", "RaggedCache"))
CACHES = {CLUSTERED: clustered_cache.replaced_caches, RAGGED: ragged_cache.replaced}
TOLD = [(QUANTIZE, mistake) for mistake in QUANTIZE.mistakes]
for of, replaced in CACHES.items():
    TOLD += [(of, mistake) for mistake in (*mistakes_of_bits(replaced), *mistakes_of_exact(replaced), *QUANTIZING)]


@pytest.fixture(autouse=True)
def cases_with_bits(monkeypatch):
    """Of the caches' cases only these, since the others have nothing to do with it."""

    def with_bits(operation, seed):
        return [case for case in cases_of(operation, seed) if "bits" in case.parameters]

    monkeypatch.setattr(mistaken, "cases_of", with_bits)


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
        (QUANTIZE, everywhere(Quantizing())),
        (CLUSTERED, everywhere(Quantizing())),
        *((of, with_any_group(replaced(ByBlocks))) for of, replaced in CACHES.items()),
    ],
    ids=["codes", "codes in ClusteredCache", "blocks in ClusteredCache", "blocks in RaggedCache"],
)
def test_what_mistakes_are_made_of_is_right(operation, patches):
    found = failures(operation, Mistake("none", "19.1", patches))
    # blocks of any size have bytes of their own
    assert [each for each in found if compare(each.case, without_sizes(each.outcome)) is not None] == []


def test_mistakes_have_causes_of_their_own():
    for operation in (QUANTIZE, *CACHES):
        causes = [mistake.cause for mistake in operation.mistakes]
        assert len(causes) == len(set(causes))
    assert len(QUANTIZE.mistakes) == 21


def test_decisions_are_those_of_the_reference():
    cases = {case.name: case for case in cases_of("quantize", 0)}
    told = decisions(cases["ties-B4-f32"])
    assert told[33] == "row 1, group 0, from 0.25 to 15.25: scale 1, not below 1"
    assert told[34] == "  0.25 is 0 scales with the zero -4 / 16: code 0"
    assert told[37] == "  1.75 is 1.5 scales with the zero -4 / 16: code 2; halfway, to the even number"
    assert len(told) == 5 * (1 + 32)
    assert decisions(cases["constant-B8"])[-1] == "row 7, group 1, from -0 to -0: scale 0, not below 0"


@pytest.mark.parametrize("name", ["ties-B8-f16", "offset-B3", "range-just-above", "smooth-B4-N100-bf16", "outliers"])
def test_decisions_end_in_the_codes_of_the_reference(name):
    case = next(case for case in cases_of("quantize", 0) if case.name == name)
    array, bits = case.arrays["array"], case.parameters["bits"]
    first = array[(0,) * (array.ndim - 2)]
    made = reference.quantize(first, bits=bits)
    lines = [line for line in decisions(case) if line.startswith("  ")]
    told = [int(line.split(" code ")[1].split(";")[0]) for line in lines]
    codes = reference.quantization.unpack(made.codes, bits).reshape(len(first), -1)[:, : first.shape[-1]]
    assert told == codes.flatten().tolist()


def found_in(**names):
    return check(Implementation(types.SimpleNamespace(**names)), only=("quantize",)).operations[0]


def in_bfloat16(array, *, bits):
    made = reference.quantize(array, bits=bits)
    return made.codes.astype(np.int32), made.scales.astype(ml_dtypes.bfloat16), made.zeros.astype(np.int64)


def in_float64(array, *, bits):
    made = reference.quantize(array, bits=bits)
    return made.codes, made.scales.astype(np.float64), made.zeros


def test_scales_may_be_bfloat16_and_integers_of_any_kind():
    assert found_in(quantize=in_bfloat16).verdict == "agrees"
    assert found_in(quantize=in_float64).counterexample.difference.text == "scales must have another dtype"


def half_up(array, *, bits):
    return reference.quantize(array + np.float32(1e-3), bits=bits)


def test_a_counterexample_is_small_and_says_what_becomes_of_each_number():
    found = found_in(quantize=half_up).counterexample
    assert found.cause.startswith("another algorithm or rule: codes differ in ")
    assert found.rule == "19"
    assert found.case.arrays["array"].size <= 3
    assert decisions(found.case)[0].startswith("row 0, group 0, from ")


class WithoutBits(reference.RaggedCache):
    def __init__(self, *, keep_ratios, chunk_size=256, n_sink=16, n_recent=64):
        rules = {"chunk_size": chunk_size, "n_sink": n_sink, "n_recent": n_recent}
        super().__init__(keep_ratios=keep_ratios, **rules)


class InTheDtype(reference.ClusteredCache):
    """What is read back is rounded to the dtype of the cache: wrong, and no known mistake."""

    def entries(self):
        keys, values, counts = super().entries()
        return None if keys is None else (keys.astype(self.keys.dtype), values.astype(self.values.dtype), counts)


class WithoutEntries:
    """A cache that shows only what is not quantized."""

    def __init__(self, **rules):
        self.held = reference.ClusteredCache(**rules)

    def append(self, keys, values):
        return self.held.append(keys, values)

    def attend(self, query, *, scale=None):
        return self.held.attend(query, scale=scale)

    n_seen, n_stored = (property(lambda cache, name=name: getattr(cache.held, name)) for name in ("n_seen", "n_stored"))


def found_in_cache(cache, name, monkeypatch, cases):
    monkeypatch.setattr("kvcluster.conformance.cases.cases_of", lambda operation, seed: cases(operation, seed))
    namespace = types.SimpleNamespace(**{name: cache, "Distinctive": reference.Distinctive})
    return check(Implementation(namespace), only=(name,), has_smallest=False).operations[0]


def test_who_has_no_bits_is_not_asked(monkeypatch):
    report = found_in_cache(WithoutBits, "RaggedCache", monkeypatch, mistaken.cases_of)
    assert {reason.split(",")[0] for reason in report.skipped} == {"no parameter bits"}
    assert report.n_cases == 0


@pytest.mark.parametrize(("cache", "is_right"), [(InTheDtype, False), (reference.ClusteredCache, True)])
def test_what_is_read_back_is_float32(cache, is_right, monkeypatch):
    report = found_in_cache(cache, "ClusteredCache", monkeypatch, mistaken.cases_of)
    assert (report.n_failed == 0) == is_right
    if not is_right:
        assert "all_keys must have another dtype" in " ".join(report.failed)


def test_who_shows_no_entries_is_asked_for_attention(monkeypatch):
    report = found_in_cache(WithoutEntries, "ClusteredCache", monkeypatch, mistaken.cases_of)
    assert (report.verdict, report.skipped, report.n_failed) == ("agrees in part", {}, 0)
    assert "all_keys" in report.not_shown


def test_no_two_cases_have_one_name():
    for operation in OPERATIONS:
        names = [case.name for case in cases_of(operation, 0)]
        assert len(names) == len(set(names))
