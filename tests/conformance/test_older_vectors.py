"""Vectors of an earlier version are right, though cases and outputs came later; what they have is checked."""

import json

import numpy as np
import pytest

from kvcluster.conformance import vectors
from kvcluster.conformance.caches import BESIDE
from kvcluster.conformance.cases import cases_of
from kvcluster.conformance.inputs import DTYPES, make_array
from kvcluster.conformance.operations import OPERATIONS


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A set of two operations, of which the second came later."""
    few = {name: OPERATIONS[name] for name in ("alternating_partition", "merge")}
    monkeypatch.setattr(vectors, "OPERATIONS", few)
    vectors.write_vectors(tmp_path / "set")
    return tmp_path / "set"


def as_of(folder, version, *, left_out=(), without_file=False):
    """The set as another version would have written it, without some cases."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["version"] = version
    cases = [case for case in manifest["cases"] if case["name"] not in left_out]
    if without_file:
        cases = [case for case in cases if case["operation"] != "merge"]
        del manifest["files"]["merge.safetensors"]
        (folder / "merge.safetensors").unlink()
    for operation, arrays, all_of in vectors.contents(0, None):
        name = f"{operation}.safetensors"
        if name in manifest["files"]:
            listed = {(case["operation"], case["name"]): case for case in cases}
            content = vectors.serialize(vectors.of_those(arrays, all_of, listed)[0])
            (folder / name).write_bytes(content)
            manifest["files"][name] = vectors.fingerprint(content)
    (folder / "manifest.json").write_text(json.dumps(manifest | {"cases": cases}))


def test_an_older_set_is_right_without_what_came_later(folder):
    as_of(folder, "0.0.1", left_out=("wide-range", "size65"))
    assert vectors.verify_vectors(folder) == []


def test_an_older_set_may_lack_an_operation(folder):
    as_of(folder, "0.0.1", without_file=True)
    assert vectors.verify_vectors(folder) == []


def test_what_a_set_of_this_version_lacks_is_told(folder):
    version = json.loads((folder / "manifest.json").read_text())["version"]
    as_of(folder, version, left_out=("wide-range",))
    assert any("merge wide-range is missing" in found for found in vectors.verify_vectors(folder))


def test_what_is_wrong_in_an_older_set_is_told(folder):
    as_of(folder, "0.0.1", left_out=("size65",))
    content = bytearray((folder / "merge.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "merge.safetensors").write_bytes(content)
    assert any("1 of " in found for found in vectors.verify_vectors(folder))


def test_files_are_without_what_they_were_without():
    case = cases_of("ClusteredCache", 0)[0]
    _, outputs = vectors.arrays_of(case)
    assert not BESIDE & set(outputs)
    assert {"n_seen", "keys", "counts", "output"} <= set(outputs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_near_ties_are_one_and_the_number_above_in_every_version_of_numpy(dtype):
    """NumPy 2.0 makes float64 of bfloat16 * 2."""
    array = make_array("near_ties", (40, 8), dtype, 1)
    one = np.ones((), DTYPES[dtype])
    above = np.nextafter(one, np.full((), 2).astype(DTYPES[dtype]))
    assert set(np.unique(array.astype(np.float64))) == {1.0, float(above)}
