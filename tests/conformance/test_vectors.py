"""Test vectors: the same bytes everywhere, what the reference says, and readable without Python."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from agreement import attention_is_exact, bounds_are_alike
from numpy._core import _multiarray_umath as processor
from safetensors.torch import load_file
from typer.testing import CliRunner

from kvcluster.cli import app
from kvcluster.conformance import OPERATIONS, all_cases
from kvcluster.conformance.comparing import expected, oracle_arguments
from kvcluster.conformance.exact import exact_attention, exact_bound
from kvcluster.conformance.vectors import STORED, verify_vectors, write_vectors
from kvcluster.reference.agreement import attention_agreement

pytestmark = pytest.mark.slow

SOURCE = Path(__file__).resolve().parents[2] / "docs" / "vectors" / "reader.cpp"
COMPILE = ("c++", "-std=c++17", "-O2", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror")
CACHES = ("ClusteredCache", "ChelseaCache", "RaggedCache", "RecallCache")
ATTENTION = ("attention", "clustered_attention", "recall_attention", *CACHES)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    write_vectors(folder := tmp_path_factory.mktemp("vectors") / "written")
    return folder


@pytest.fixture
def copied(written, tmp_path):
    return Path(shutil.copytree(written, tmp_path / "copied"))


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    if not shutil.which("c++"):
        pytest.skip("no C++ compiler here")
    program = tmp_path_factory.mktemp("reader") / "reader"
    subprocess.run([*COMPILE, SOURCE, "-o", program], check=True)
    return lambda folder: subprocess.run([program, folder], capture_output=True, text=True)


def manifest_of(folder):
    return json.loads((folder / "manifest.json").read_text())


def content_of(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def run_command(*arguments):
    done = CliRunner().invoke(app, ["vectors", *map(str, arguments)])
    return done.exit_code, done.output


def spoil(folder, operation, array):
    """Flip the lowest bit of the first number of an array."""
    content = bytearray((path := folder / f"{operation}.safetensors").read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    content[start + json.loads(content[8:start])[array]["data_offsets"][0]] ^= 1
    path.write_bytes(content)


def test_vectors_are_the_same_twice_and_another_seed_is_not(written, copied):
    assert write_vectors(copied) == len(manifest_of(written)["cases"])  # replaces an earlier set
    assert content_of(copied) == content_of(written)
    write_vectors(copied, seed=1)
    same = content_of(copied).items() & content_of(written).items()
    assert [name for name, _ in same] == ["alternating_partition.safetensors"]  # it has no numbers
    assert verify_vectors(copied) == []
    assert [path.name for path in copied.parent.iterdir()] == ["copied"]  # nothing temporary is left


def test_vectors_do_not_depend_on_the_processor(written, tmp_path):
    found = [name for name in processor.__cpu_dispatch__ if processor.__cpu_features__[name]]
    if not found:
        pytest.skip("NumPy has no vector instructions to switch off here")
    code = "from kvcluster.conformance.vectors import *; write_vectors('plain')"
    plain = {"NPY_DISABLE_CPU_FEATURES": " ".join(found), "OPENBLAS_CORETYPE": "Nehalem"}
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, **plain}, cwd=tmp_path)
    assert content_of(tmp_path / "plain") == content_of(written)


def test_vectors_do_not_depend_on_the_last_bits_of_library_functions(written, tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    for name in ("exp", "log", "einsum"):
        right = getattr(np, name)

        def inexact(*arguments, right=right, **named):
            result = np.asarray(right(*arguments, **named))
            error = max(2.0**-46, float(np.finfo(result.dtype).eps))
            return (result * (1 + error * rng.choice([-1, 1], result.shape))).astype(result.dtype)

        monkeypatch.setattr(np, name, inexact)
    expected.cache_clear()  # nothing that exact functions gave may be left
    write_vectors(tmp_path / "inexact")
    expected.cache_clear()
    assert content_of(tmp_path / "inexact") == content_of(written)


def test_exact_attention_and_bounds_are_those_of_the_reference(written):
    for case in (case for case in all_cases(ATTENTION) if not case.is_refused):
        query, *entries, scale = oracle_arguments(case)
        oracle, right = exact_attention(query, *entries, scale), expected(case)["output"]
        assert attention_is_exact(oracle, right)
        assert "bound" not in expected(case)  # writing vectors leaves alone what the suite remembers
        found = attention_agreement(oracle.astype(query.dtype), query, *entries, scale=scale)
        assert bounds_are_alike(exact_bound(oracle, query, *entries, scale), found.bound, query.dtype)


def test_every_operation_dtype_and_awkward_kind_is_there(written):
    manifest, names, dtypes, compared = manifest_of(written), defaultdict(set), defaultdict(set), set()
    assert (manifest["arithmetic_contract"], manifest["seed"]) == (1, 0)
    for case in manifest["cases"]:
        names[case["operation"]].add(case["name"])
        dtypes[case["operation"]] |= {array["dtype"] for array in case["inputs"].values()}
        compared |= {output["compare"] for output in case["outputs"].values()}
    assert compared == {"bits", "integers", "bound"}
    for operation in set(OPERATIONS) - {"alternating_partition"}:
        assert dtypes[operation] >= {"F16", "BF16", "F32"}, operation
    for operation in ("similarity", "merge", "chunked_soft_matching", "kmeans", "select_clusters", "quantize"):
        assert {"signs", "near_ties", "duplicates", "zeros"} <= {name.split("-")[0] for name in names[operation]}
    assert {"normal-T65", "signs-heads-keep0.2"} <= names["chunked_soft_matching"]  # partial chunk, three rounds
    assert {"large-counts", "counts-of-zero"} <= names["clustered_attention"]
    assert {"smooth-G3-T65-D64-f32-scale", "empty-clusters"} <= names["attention"] | names["kmeans"]


def test_arrays_are_as_the_manifest_says_and_as_other_readers_see_them(written):
    stored = {operation: load_file(written / f"{operation}.safetensors") for operation in OPERATIONS}
    for case in manifest_of(written)["cases"]:
        for part, short_part in (("inputs", "in"), ("outputs", "out")):
            for name, says in case[part].items():
                array = stored[case["operation"]].pop(f"{case['name']}/{short_part}/{name}")
                assert (STORED[str(array.dtype)[6:]], list(array.shape)) == (says["dtype"], says["shape"])
        if "output" in case["outputs"]:
            bound = stored[case["operation"]].pop(f"{case['name']}/out/bound")
            assert (list(bound.shape), (bound > 0).all()) == (case["outputs"]["output"]["shape"][:-2], True)
    assert not any(stored.values())


def test_the_reader_verifies_the_vectors(written, reader):
    done = reader(written)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split()[::6] == ["similarity", "merge", "attention", "clustered_attention"]
    assert reader(written / "nothing").returncode == 2


@pytest.mark.parametrize(  # in the last, the output is then beyond its bound
    "place",
    [
        "merge normal-E1-f16/out/centroids",
        "similarity normal-D1-f16/out/similarity",
        "clustered_attention large-counts/in/counts",
    ],
)
def test_one_wrong_bit_is_found(copied, reader, place):
    operation, array = place.split()
    spoil(copied, operation, array)
    status, said = run_command("--verify", copied)
    assert (status, f"{array}: 1 of" in said, "sha256" in said) == (1, True, True)
    manifest = manifest_of(copied)
    manifest["files"][f"{operation}.safetensors"]["sha256"] = content_of(copied)[f"{operation}.safetensors"]
    (copied / "manifest.json").write_text(json.dumps(manifest))  # by someone who knows what a checksum is for
    assert [found.split(":")[1].strip() for found in verify_vectors(copied)] == [array]
    done = reader(copied)
    assert (done.returncode, f"{operation} {array.split('/')[0]} differs" in done.stdout) == (1, True)


def test_edited_manifests_and_missing_files_are_found(copied):
    manifest = manifest_of(copied)
    last = manifest["cases"][-1]
    last["parameters"]["budget"] += 1
    manifest["cases"][0]["name"] = "other"
    (copied / "manifest.json").write_text(json.dumps(manifest))
    (copied / "kmeans.safetensors").unlink()
    (copied / "merge.safetensors").write_bytes(b"nothing")
    found = "\n".join(verify_vectors(copied))
    changed = f"{last['operation']} {last['name']} is missing"
    for text in ("size0 is missing", "other is not a case", changed, "kmeans.safetensors: missing", "read"):
        assert text in found


@pytest.mark.parametrize("foreign", ["mine.txt", "folder.safetensors", "link.safetensors"])
def test_what_a_manifest_merely_names_is_not_removed(foreign, copied, tmp_path):
    """Whoever writes a manifest may name anything in it."""
    path, mine = copied / foreign, tmp_path / "mine.txt"
    mine.write_text("not to be lost")
    if foreign.startswith("folder"):
        path.mkdir()
        (path / "mine.txt").write_text("not to be lost")
    elif foreign.startswith("link"):
        path.symlink_to(mine)
    else:
        path.write_text("not to be lost")
    manifest = manifest_of(copied)
    manifest["files"][foreign] = {"sha256": "", "bytes": 0}
    (copied / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(FileExistsError, match=f"with {foreign}"):
        write_vectors(copied)
    assert path.exists()
    assert mine.read_text() == "not to be lost"


def test_the_command_writes_verifies_and_refuses_foreign_folders(tmp_path, monkeypatch):
    folder = tmp_path / "new" / "vectors"
    assert run_command(folder, "--seed", 3)[0] == 0
    assert run_command("--verify", folder)[0] == 0
    (folder / "mine.txt").write_text("not to be lost")
    assert {run_command(target)[0] for target in (folder, folder / "mine.txt")} == {2}
    assert (folder / "mine.txt").exists()
    assert run_command("--verify", tmp_path)[0] == 2
    monkeypatch.delitem(sys.modules, "kvcluster.conformance.vectors")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    assert "pip install 'kvcluster[oracle]'" in run_command(tmp_path / "again")[1]
