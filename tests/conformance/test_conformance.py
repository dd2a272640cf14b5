"""The conformance suite: our own backends pass it, every wrong implementation is caught, and its real cause named."""

import functools
import hashlib
import inspect
import json
import re
import subprocess
import sys
import time
import types
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from mutants import MUTANTS
from ports import RIGHT_PORT, WRONG_PORT
from typer.testing import CliRunner

from kvcluster import fast, reference
from kvcluster.cli import app
from kvcluster.conformance import OPERATIONS, Case, Implementation, all_cases, check, load_implementation
from kvcluster.conformance.comparing import compare
from kvcluster.conformance.explaining import decisions
from kvcluster.conformance.implementation import run
from kvcluster.conformance.operations import OPERATIONS as KNOWN
from kvcluster.conformance.port import tensor_of

# Operations, parameters, and a name, that the first cases did not have; those of heads with shares; those of few bits.
LATER = {"ChelseaCache", "new-defaults", "whole_heads", "init_seed", "is_per_query_head", "is_exact_counted"}
OF_SHARES, OF_BITS, NEWEST = {"RaggedCache", "recent_share"}, {"bits"}, {"attended_matching"}

# What the message must say of each mutant, where the mistake is; the others' operations have a cause of their own.
CAUSES = {
    "tied destinations: the last": "ties between destinations go to the largest index",
    "tied sources: the last": "ties between sources go to the largest index",
    "odd entries as sources": "sources and destinations are swapped",
    "entries in another order": "entries change their order",
    "a partial chunk is merged as well": "the trailing partial chunk is clustered",
    "the last whole chunk is left out": "the last whole chunk is left out",
    "one matching for all heads": "all leading indices share one matching",
    "only one round": "there is one round only",
    "target by floor": "the target is rounded down",
    "target in float32": "the target is rounded",
    "similarity: dot product": "similarities are dot products",
    "similarity: float32": "nearly equal, not bit for bit: float64",
    "similarity: no sign": "similarities have lost their sign",
    "similarity: NaN of a zero key": "where a norm is 0 the similarity is 0",
    "similarity: summed in order": "nearly equal, not bit for bit: float64, the order of additions",
    "filter without a margin": "similarities",
    "sums in float32": "members are added in float32",
    "sums in descending order": "members are added in another order",
    "sums from +0.0": "sums start at +0.0",
    "later merges forget the counts": "later rounds average centroids without their counts",
    "centroids rounded between rounds": "centroids between rounds are rounded to the dtype",
    "merge in the dtype": "centroids are rounded to the dtype of the tokens",
    "log counts dropped": "log counts are missing",
    "log2 of the counts": "logarithms of counts have base 2",
    "counts in float16": "counts went through float16",
    "query heads dealt out": "KV heads and groups are confused",
    "explicit scale forgotten": "scale is ignored",
    "cache: recent tokens are clustered": "the recent tokens are clustered too",
    "cache: a token late": "a chunk is clustered a token late",
    "cache: one chunk an append": "an append clusters one chunk at most",
    "cache: single tokens are not clustered": "the cache depends on how the tokens arrived",
    "cache: append returns what is left": "append returns the entries after its clustering",
    "cache: chunks shifted by the sinks": "chunk boundaries are shifted by the sinks",
    "cache: sinks are clustered": "sinks are clustered too",
    "empty clusters become 0": "an empty cluster becomes zero",
    "k-means: a round too few": "there is one round too few",
    "k-means: assigns after the last update": "tokens are assigned once more",
    "k-means: begins at random tokens": "the centroids begin at the tokens i * tokens // n_clusters",
    "k-means: ties to the last cluster": "ties between clusters go to the largest index",
    "k-means: Euclidean distance": "similarities are Euclidean distances",
    "recall: one query of the group": "the first query of the group decides alone",
    "recall: no deviations": "deviations are ignored",
    "recall: no mean": "the mean cluster's score is not taken off",
    "recall: ties to the last cluster": "ties between clusters go to the largest index",
    "budget off by one": "one token too many is taken",
    "recall: not trimmed": "the last cluster is not trimmed",
    "recall cache: no sinks": "sinks are not attended to",
    "recall cache: a token twice": "is attended to twice",
    "recall cache: sinks on top": "sinks are not counted",
    "recall cache: zero is None": "prompt_segment_size 0 is taken for None",
    "recall cache: no sample": "init_seed is ignored",
    "recall cache: one sample for all heads": "all heads draw the same tokens",
    "recall cache: one sample for all segments": "all segments draw the same indices",
    "recall cache: the group recalls together": "with is_per_query_head each query head does alone",
    "recall cache: all tokens in the budget": "sinks and recent tokens are counted in the budget",
}


def on_backend(backend, dtypes=("f16", "bf16", "f32")):
    """The fast path with every function and class on one backend, as far as it has one."""
    made = types.SimpleNamespace(ARRAYS="torch", DTYPES=dtypes)
    if backend == "triton" and torch.cuda.is_available():
        made.from_numpy = lambda array: tensor_of(array).cuda()
    for name in (*OPERATIONS, "BoundedCache"):
        made.__dict__[name] = with_backend(getattr(fast, name), backend)
    made.Distinctive = fast.Distinctive
    return Implementation(made, f"kvcluster.fast, {backend}")


def with_backend(function, backend):
    """Its signature stays: the suite asks which parameters there are. Some have no backends."""
    if "backend" not in inspect.signature(function).parameters:
        return function

    @functools.wraps(function)
    def made(*arrays, **parameters):
        return function(*arrays, **parameters, backend=backend)

    return made


def assert_agrees(report):
    wrong = {each.operation: each.failed for each in report.operations if each.n_failed}
    assert report.agrees, wrong
    assert all(each.n_cases for each in report.operations)


def test_the_reference_passes_in_a_minute_of_one_processor():
    begun = time.process_time()
    report = check(Implementation(reference))
    assert time.process_time() - begun < 60
    assert_agrees(report)
    assert {each.verdict for each in report.operations} == {"agrees"}  # everything is shown
    assert not any(each.skipped for each in report.operations)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_other_numbers_pass_too(seed):
    assert_agrees(check(Implementation(reference), seed=seed))
    assert_agrees(check(Implementation(fast), seed=seed, only=OPERATIONS[:8]))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_the_fast_path_passes(backend):
    assert_agrees(check(on_backend(backend)))


@pytest.mark.slow
@pytest.mark.parametrize("operation", OPERATIONS[2:])
def test_the_kernels_pass(operation, few_programs):
    """Without subnormal bfloat16 numbers, which Triton's interpreter reads wrongly.

    Interpreted, two caches take minutes: entries in float16 are those of tests/fast/test_pooled_matching.py for
    `ChelseaCache`, and for `RaggedCache` made by the kernels of `ClusteredCache`.
    """
    interpreted = ("f32",) if operation in ("ChelseaCache", "RaggedCache") else ("f16", "f32")
    dtypes = ("f16", "bf16", "f32") if torch.cuda.is_available() else interpreted
    assert_agrees(check(on_backend("triton", dtypes), only=(operation,), has_smallest=False))


def test_every_mutant_has_a_cause():
    assert {mutant.name for mutant in MUTANTS} == set(CAUSES)
    assert len(MUTANTS) >= 20


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_every_mutant_is_caught_and_its_cause_named(mutant, monkeypatch):
    mutant.patch(monkeypatch)
    report = check(Implementation(fast), only=mutant.operations, has_smallest=False)
    assert not report.agrees
    found = [each.counterexample for each in report.operations if each.counterexample is not None]
    causes = [each.cause for each in found if each.cause is not None]
    assert any(CAUSES[mutant.name] in cause for cause in causes), (causes, report.operations)
    assert all("." in each.rule for each in found if each.cause is not None)


def test_rules_are_paragraphs_of_the_specification():
    page = (Path(reference.__file__).parent / "SPECIFICATION.md").read_text()
    for operation in KNOWN.values():
        assert re.search(rf"(?m)^## {operation.section} `{operation.name}`(?: and `\w+`)?$", page)
        for mistake in operation.mistakes:
            assert f"**{mistake.rule}**" in page, mistake.cause


def test_the_page_counts_mistakes_and_mutants():
    """Those of all test files, each spelled `Mutant(NAME, ...)`."""
    tests = Path(__file__).resolve().parents[1]
    files = (tests / "mutants.py", *(tests / "conformance").glob("*.py"))
    n_mutants = sum(len(re.findall(r'\bMutant\(\s*"', path.read_text())) for path in files)
    n_causes = len({mistake.cause for operation in KNOWN.values() for mistake in operation.mistakes})
    page = (tests.parent / "docs" / "oracle.md").read_text()
    assert f"one of {n_causes} known ones" in page
    assert f"all of {n_mutants} wrong implementations" in page
    assert n_mutants > len(MUTANTS) > 50


def test_a_counterexample_is_small_and_says_what_the_reference_decides(monkeypatch):
    next(mutant for mutant in MUTANTS if mutant.name == "tied destinations: the last").patch(monkeypatch)
    found = check(Implementation(fast), only=("chunked_soft_matching",)).operations[0].counterexample
    assert found.case.arrays["keys"].size <= 8
    assert found.difference.what == "labels"
    assert any("tie exactly: the smallest index wins" in line for line in decisions(found.case))
    assert found.expected["labels"].tolist() != found.got["labels"].tolist()


@pytest.mark.parametrize(
    ("digest", "left_out"),
    [
        ("8468b9dea3e91f2a", LATER | OF_SHARES | OF_BITS | NEWEST),
        ("57ac335f903c4a40", OF_SHARES | OF_BITS | NEWEST),
        ("277e4b510516d034", OF_BITS | NEWEST),
        ("e0639d886cd868de", NEWEST),
        ("603240c5f83b4cc8", set()),
    ],
    ids=["first", "before-shares", "before-bits", "before-queries", "all"],
)
def test_cases_are_the_same_to_the_last_bit_on_every_machine(digest, left_out):
    """Digests of all inputs, and of those of earlier versions, each made once."""
    found = hashlib.sha256()
    for case in all_cases():
        # the reference makes the clusters of recall_attention
        if case.operation != "recall_attention" and not left_out & {case.operation, case.name, *case.parameters}:
            for array in case.arrays.values():
                found.update(array.tobytes())
    assert found.hexdigest()[:16] == digest


def test_what_is_raised_or_has_another_shape_or_dtype_is_told():
    case = Case("alternating_partition", "two", {}, {"size": 2})

    def difference(result):
        names = types.SimpleNamespace(alternating_partition=lambda size: result)
        return compare(case, run(Implementation(names), case)).text

    assert difference((np.arange(2), np.arange(1))) == "sources must have another shape"
    assert difference((np.zeros(1), np.ones(1))) == "sources must have another dtype"
    assert difference(3) == difference((1, 2, 3)) == "this input must not raise"


def run_check(*arguments):
    return CliRunner().invoke(app, ["check", *map(str, arguments)])


def test_the_command_says_right_wrong_and_cannot(tmp_path):
    right, wrong, empty = (tmp_path / f"{name}_port.py" for name in ("right", "wrong", "empty"))
    for path, code in ((right, RIGHT_PORT), (wrong, WRONG_PORT), (empty, "x = 1\n")):
        path.write_text(code)
    assert run_check(right).exit_code == 0
    done = run_check(wrong, "--json", tmp_path / "report.json", "--junit", tmp_path / "report.xml")
    assert done.exit_code == 1
    assert "sources and destinations are swapped" in done.output
    assert "3.1 of SPECIFICATION.md" in done.output
    report = json.loads((tmp_path / "report.json").read_text())
    verdicts = {each["operation"]: each["verdict"] for each in report["operations"]}
    assert (verdicts["alternating_partition"], verdicts["similarity"], verdicts["merge"]) == (
        "differs",
        "agrees",
        "not checked",
    )
    suite = ElementTree.parse(tmp_path / "report.xml").getroot()
    assert (suite.get("tests"), suite.get("failures")) == (str(len(OPERATIONS)), "1")
    nowhere = tmp_path / "none" / "file"
    for option in ("--json", "--junit"):
        assert run_check(right, option, nowhere).exit_code == 2
    assert run_check(nowhere.with_suffix(".py"), "--scaffold").exit_code == 2
    for arguments in ((empty,), (tmp_path / "none.py",), ("no.such.module",), (right, "--only", "nothing")):
        assert run_check(*arguments).exit_code == 2, arguments
    assert run_check(right, "--max-seconds", 0).exit_code == 2


def test_the_report_is_json_where_results_are_not_finite(tmp_path):
    (tmp_path / "nan_port.py").write_text("import numpy as np\n\ndef similarity(a, b):\n    return a @ b.mT * np.nan\n")
    assert run_check(tmp_path / "nan_port.py", "--json", tmp_path / "report.json").exit_code == 1

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    report = json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse)
    found = next(each["counterexample"] for each in report["operations"] if each["operation"] == "similarity")
    assert "nan" in str(found["got"])


def test_the_scaffold_is_an_adapter(tmp_path):
    path = tmp_path / "my_adapter.py"
    assert run_check(path, "--scaffold").exit_code == 0
    path.write_text(path.read_text().replace("# import my_package", "import kvcluster.reference as my_package"))
    implementation = load_implementation(str(path))
    caches = {"ClusteredCache", "ChelseaCache", "RaggedCache", "RecallCache"}
    assert set(implementation.operations) == set(OPERATIONS) - caches
    assert run_check(path, "--scaffold").exit_code == 2  # nothing is overwritten


@pytest.mark.slow
def test_pytest_runs_the_suite_on_any_implementation(tmp_path):
    (tmp_path / "wrong_port.py").write_text(WRONG_PORT)
    command = [sys.executable, "-m", "pytest", "-q", "--pyargs", "kvcluster.conformance", "-p", "no:xdist"]
    done = subprocess.run(
        [*command, "--implementation", "wrong_port.py"], capture_output=True, text=True, cwd=tmp_path, timeout=300
    )
    assert done.returncode == 1, done.stdout
    assert "test_result_is_the_references[alternating_partition-size1]" in done.stdout
    assert "rule 3.1 of SPECIFICATION.md" in done.stdout
    n_cases = sum(1 for case in all_cases(("similarity",)))
    assert f"{n_cases + 1} passed" in done.stdout  # and of the partition size 0
