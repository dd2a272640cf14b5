"""What is said of a wrong implementation: the right cause, a case that can be repeated, and the first wrong number."""

import json
import os
import subprocess
import sys
import types
from xml.etree import ElementTree

import numpy as np
import pytest
from ports import RIGHT_PORT, WRONG_PORT
from typer.testing import CliRunner

from kvcluster import reference
from kvcluster.cli import app
from kvcluster.conformance import Implementation, check
from kvcluster.conformance.operations.merge import flushed_mean, unit_mean
from kvcluster.conformance.reporting import lines_on


def found_in(operation, answer, *, has_smallest=False):
    namespace = types.SimpleNamespace(**{operation: answer})
    return check(Implementation(namespace), only=(operation,), has_smallest=has_smallest).operations[0].counterexample


def clustering_of(given):
    return reference.Clustering(given.labels, given.counts)


def merge_by(wrong):
    """`merge` of the reference, of which `wrong` makes something else."""
    return lambda array, given: wrong(array, clustering_of(given), reference.merge(array, clustering_of(given)))


def test_a_right_mean_of_another_dtype_is_no_other_order():
    found = found_in("merge", merge_by(lambda array, given, right: right.astype(np.float64)))
    assert found.cause == "another dtype: centroids must be float32, not float64; the numbers are right but for that"


def test_nan_is_not_nearly_equal():
    def mostly(array, given, right):
        right[..., 0, 0] = np.nan
        return right

    found = found_in("merge", merge_by(mostly))
    assert found.cause is None
    assert found.difference.kind == "not finite"


NAMED = {
    "means flush subnormal numbers to zero": lambda array, given, right: flushed_mean(array, given),
    "means are scaled to length 1": lambda array, given, right: unit_mean(array, given),
}


@pytest.mark.parametrize("cause", NAMED)
def test_known_mistakes_have_names(cause):
    assert found_in("merge", merge_by(NAMED[cause])).cause.startswith(cause)


def test_a_square_root_is_named_though_its_last_bits_are_its_own():
    def similarity(a, b):
        a, b = a.astype(np.float64), b.astype(np.float64)
        lengths = np.sqrt((a * a).sum(-1))[..., :, None] * np.sqrt((b * b).sum(-1))[..., None, :]
        return np.where(lengths == 0, 0.0, a @ b.swapaxes(-1, -2) / np.where(lengths == 0, 1.0, lengths))

    assert "without a square root" in found_in("similarity", similarity).cause


def last_of_equal(keys, *, keep_ratio, chunk_size=256):
    """Ties go to any index: here one that a hash says."""
    made = reference.chunked_soft_matching(keys, keep_ratio=keep_ratio, chunk_size=chunk_size)
    exact = np.isin(np.abs(keys.astype(np.float64)), (1.0,)).all()
    return reference.Clustering(made.labels[..., ::-1].copy(), made.counts) if exact else made


def test_exact_ties_alone_are_a_sort_that_is_not_stable():
    found = found_in("chunked_soft_matching", last_of_equal)
    assert found.cause == "only exact ties fail: the smallest index must win, so every sort must be stable"
    assert found.rule == "2.5"
    assert found.findings[0].where.startswith("only signs")


def test_several_deviations_are_told_the_largest_first():
    """Wrong in ordinary inputs in one way, in tiny ones in another."""

    def wrong(array, given, right):
        sizes = np.abs(array.astype(np.float64))
        if 0 < sizes.max() < 2.0**-120:
            return flushed_mean(array, given)
        return right * np.float32(2) if array.dtype == np.float16 else unit_mean(array, given)

    found = found_in("merge", merge_by(wrong))
    causes = [finding.cause for finding in found.findings]
    assert causes[0] == "means are scaled to length 1: they stay as they are"
    assert "means flush subnormal numbers to zero: they must be kept" in causes


def test_the_smallest_case_fails_in_the_same_way():
    """Right but for float16 in five dims or more and several heads, where a label is wrong."""

    def similarity(a, b):
        right = reference.similarity(a, b)
        if a.dtype == np.float16 and a.shape[-1] >= 5 and a.shape[0] > 1:
            right[0, 0, 0] += 1
        elif a.shape[-1] == 1:
            return right.astype(np.float32) if a.size > 1000 else right
        return right

    found = found_in("similarity", similarity, has_smallest=True)
    assert found.case.name == "smallest found"
    assert (found.case.arrays["a"].dtype, found.case.arrays["a"].shape) == (np.float16, (2, 1, 5))
    assert (found.difference.what, found.difference.kind) == ("similarity", "value")


def test_the_first_wrong_number_of_a_large_array_is_shown():
    def similarity(a, b):
        right = reference.similarity(a, b)
        right[1, 2, 3] += 1
        return right

    lines = lines_on(found_in("similarity", similarity))
    assert "Difference: 1 of 126 differ, the first at similarity[1, 2, 3]" in lines
    at = next(number for number, line in enumerate(lines) if line.startswith("  there expected"))
    expected, got = (float(line.split()[2]) for line in lines[at : at + 2])
    assert got == expected + 1


def test_what_raises_is_shown_with_file_and_line():
    def merge(array, clustering):
        raise KeyError("no")

    lines = lines_on(found_in("merge", merge))
    assert "What is wrong: every failing call raises KeyError('no')" in lines
    assert any(line.startswith(f"  at {__file__}, line ") and "KeyError" in line for line in lines)


def run_check(*arguments):
    return CliRunner().invoke(app, ["check", *map(str, arguments), "--no-isolate"])


def test_a_saved_script_repeats_the_case(tmp_path):
    (tmp_path / "port.py").write_text(
        WRONG_PORT.replace("a, b = a.astype(np.float64)", "a, b = 2 + a.astype(np.float64)")
    )
    done = run_check(tmp_path / "port.py", "--save", tmp_path / "cases", "--json", tmp_path / "report.json")
    assert done.exit_code == 1
    scripts = sorted(path.name for path in (tmp_path / "cases").glob("*.py"))
    assert scripts == ["alternating_partition.py", "similarity.py"]
    for name in scripts:
        assert len((tmp_path / "cases" / name).read_text().splitlines()) <= 11
    done = subprocess.run([sys.executable, tmp_path / "cases" / "similarity.py"], capture_output=True, text=True)
    assert (done.returncode, "similarity smallest found: " in done.stdout) == (1, True), done.stderr
    (tmp_path / "port.py").write_text(RIGHT_PORT)
    done = subprocess.run([sys.executable, tmp_path / "cases" / "similarity.py"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "similarity smallest found: right\n")


def test_reports_say_what_they_are_of(tmp_path):
    (tmp_path / "port.py").write_text("DTYPES = ['f32']\n" + WRONG_PORT)
    files = ("--json", tmp_path / "report.json", "--junit", tmp_path / "report.xml")
    assert run_check(tmp_path / "port.py", *files, "--seed", 3).exit_code == 1
    report = json.loads((tmp_path / "report.json").read_text())
    told = (report["arithmetic_contract"], report["seed"], report["dtypes"], report["differs"])
    assert told == (1, 3, ["f32"], True)
    assert report["version"]
    assert all(each["seconds"] >= 0 for each in report["operations"])
    found = report["operations"][0]["counterexample"]
    assert found["findings"][0]["where"]
    suite = ElementTree.parse(tmp_path / "report.xml").getroot()
    properties = {each.get("name"): each.get("value") for each in suite.iter("property")}
    assert (properties["seed"], properties["dtypes"], properties["version"]) == ("3", "f32", report["version"])
    assert all(float(case.get("time")) >= 0 for case in suite.iter("testcase"))
    failure = next(suite.iter("failure"))
    assert found["difference"]["expected"] in failure.text


def test_a_result_of_none_is_json(tmp_path):
    (tmp_path / "port.py").write_text("def similarity(a, b):\n    return None\n")
    assert run_check(tmp_path / "port.py", "--json", tmp_path / "report.json").exit_code == 1
    assert "NoneType" in (tmp_path / "report.json").read_text()


def test_pytest_with_an_adapter_that_cannot_be_loaded_is_one_line(tmp_path):
    (tmp_path / "broken.py").write_text("import no_such_module\n")
    command = [sys.executable, "-m", "pytest", "-q", "--pyargs", "kvcluster.conformance", "-p", "no:xdist"]
    command += ["-p", "no:cacheprovider", "--implementation", "broken.py"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "COLUMNS": "200"})
    assert done.returncode == 2, done.stdout
    errors = [line for line in (done.stdout + done.stderr).splitlines() if "no_such_module" in line]
    assert len(errors) == 1
    assert "--implementation broken.py: ModuleNotFoundError: No module named 'no_such_module' (" in errors[0]
