"""The benchmarks run, their baseline is sane, and `make gpu` cannot pass by accident."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from agreement import equal_in_float32, equal_in_float64

from kvcluster import fast, reference

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def run(*command):
    return subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(("chunk_size", "target"), [(64, 16), (63, 13), (8, 4), (5, 5)])
def test_plain_baseline_is_sane(chunk_size, target):
    """Random keys have no near ties: it decides as the certified path does, and its means are means."""
    from benchmarks.matching.plain import plain_compress, plain_compress_tiled
    from kvcluster.fast.plain.soft_matching import compress

    keys = torch.randn(2, 3 * chunk_size, 20, generator=torch.Generator().manual_seed(chunk_size))
    labels, counts, centroids = plain_compress(keys, chunk_size, target)
    assert counts.shape == (6, target)
    assert (counts.sum(dim=-1) == chunk_size).all()
    expected = compress(keys, None, chunk_size=chunk_size, target=target)
    assert torch.equal(labels, expected.labels)
    assert torch.equal(counts, expected.counts)
    assert equal_in_float32(centroids.numpy(), expected.keys.numpy())
    assert not equal_in_float32(centroids.numpy() * np.float32(1.0001), expected.keys.numpy())
    tiled = plain_compress_tiled(keys, chunk_size, target, tile=4)
    assert all(torch.equal(a, b) for a, b in zip(tiled[:2], (labels, counts), strict=True))


def test_ratios_and_exponent_can_be_checked_by_hand():
    from kvcluster.evaluation.statistics import fitted_exponent, ratios
    from kvcluster.evaluation.timing import seconds_in_turn

    found = ratios([2.0, 3.0, 8.0], [1.0, 2.0, 2.0])
    assert (found.median, found.low, found.high) == (2.0, 1.5, 4.0)
    assert equal_in_float64(np.array([fitted_exponent([1, 2, 4], [3.0, 12.0, 48.0])]), np.array([2.0]))
    order = []
    seconds = seconds_in_turn({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=2)
    assert "".join(order) == "ababab"
    assert [len(each) for each in seconds.values()] == [2, 2]


def test_bytes_that_differ_are_counted():
    from benchmarks.published.agreement import differing_bytes, fed

    keys = np.random.default_rng(0).standard_normal((2, 90, 4)).astype(np.float32)
    plan = {"ratio": 0.3, "max_new_tokens": 4, "interval": 2, "chunk_size": 8, "n_sink": 2, "n_recent": 4}
    oracle = fed(reference.ChelseaCache(**plan, whole_heads=(1,)), keys, keys, [80, 10])
    made = fed(fast.ChelseaCache(**plan, whole_heads=(1,)), *[torch.from_numpy(keys)] * 2, [80, 10])
    assert differing_bytes(made, oracle) == (oracle.nbytes, 0)
    made.counts[0, 5] += 1
    made.whole_keys[0, 0] = 0
    assert differing_bytes(made, oracle) == (oracle.nbytes, 1 + 4 * 4)
    shorter = fed(fast.ChelseaCache(**plan, whole_heads=(1,)), *[torch.from_numpy(keys)] * 2, [80, 1])
    assert differing_bytes(shorter, oracle) == (oracle.nbytes, oracle.nbytes)


@pytest.mark.slow
def test_peak_memory_sees_what_torch_allocates():
    """Both normalised keys and weighted ones are as large as the keys, and live at once."""
    from benchmarks.matching.memory import peak_bytes

    keys = 8 * 8192 * 128 * 4
    assert 1.5 * keys < peak_bytes("plain", 8192) < 6 * keys


def test_a_missed_target_is_said(capsys):
    from rich.console import Console

    from kvcluster.evaluation.report import Claim, Line, Section, print_sections

    lines = [Line(("fast",), Claim("speed", 1.0, 1.5)), Line(("big",), Claim("size", 1.3, 1.2)), Line(("other",))]
    print_sections(Console(width=100), [Section("Costs", ("what",), lines)])
    printed = capsys.readouterr().out
    assert "1 of 2 targets met: missed size" in printed
    assert "at most 1.2" in printed


def test_public_attention_is_timed_beside_the_attention_inside(tmp_path):
    file = tmp_path / "checks.json"
    done = run(BENCHMARKS / "checks" / "run.py", "--quick", "--processor", "--json", file)
    assert done.returncode == 0, done.stderr
    [section] = json.loads(file.read_text())["sections"]
    assert set(section["seconds"]) == {"float32", "bfloat16", "float16"}
    assert len(section["claims"]) == 6


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_gpu_without_cuda_fails_loudly(tmp_path):
    done = run(BENCHMARKS / "gpu" / "run.py", "--json", tmp_path / "results.json")
    assert done.returncode == 1
    assert "no CUDA device" in done.stderr
    assert not (tmp_path / "results.json").exists()


BARE = """
import importlib.util, runpy, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("jaxtyping", "rich", "typer", "ml_dtypes", "transformers", "platformdirs"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "jaxtyping" else found(name, package)
script = sys.argv[1] + "/gpu/run.py"
sys.argv = [script, "--interpret", "--json", sys.argv[2]]
runpy.run_path(script, run_name="__main__")
"""


@pytest.mark.slow
def test_gpu_dry_run_agrees_with_torch_triton_and_numpy_alone(tmp_path):
    """Without jaxtyping, rich, ml_dtypes or transformers; and it says that it was dry."""
    done = run("-c", BARE, BENCHMARKS, tmp_path / "results.json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "NOTHING RAN ON A GPU" in done.stdout
    made = json.loads((tmp_path / "results.json").read_text())
    assert made["interpreted"]
    assert sum(row["checks"] for row in made["agreement"]) > 100
    assert not any(row["differing"] for row in made["agreement"])


def test_gpu_agreement_tells_wrong_bits():
    """The comparison itself: another dtype, another sign of zero, another last bit."""
    from benchmarks.gpu.keys import same_bits

    ones = torch.ones(2, 3)
    assert same_bits(ones, ones.numpy())
    assert not same_bits(ones, ones.double())
    assert not same_bits(torch.zeros(1), -torch.zeros(1))
    assert not same_bits(ones, torch.nextafter(ones, 2 * ones))


@pytest.mark.parametrize("name", ["smollm2", "gemma3-270m"])
def test_bytes_worked_out_from_runs_in_float32_are_those_that_caches_report(name):
    """Of runs that hold both: exact entries, whose share in bfloat16 was measured too."""
    from benchmarks.bits.run import results
    from benchmarks.published.tables import NUMBERS, share_of_bytes
    from kvcluster.evaluation.quality import summarize
    from kvcluster.evaluation.runs import Runs

    runs = [run for run in Runs(results(name)).all if run["n_tokens"] == 4096]
    full = [run for run in runs if run["key"]["method"] == "full"]
    measured = {each["keep"]: each["of_bfloat16"] for each in summarize(runs) if each["method"] == "bits-16"}
    assert len(measured) == 3
    for keep, expected in measured.items():
        group = [run for run in runs if (run["key"]["method"], run["key"]["keep"]) == ("bits-16", keep)]
        assert share_of_bytes(group, full, NUMBERS[name]) == expected
        assert share_of_bytes(group, full, NUMBERS[name] // 2) != expected
