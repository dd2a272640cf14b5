"""Attention to entries by C++, Triton and torch: each within the bound of the reference, wherever a token stands."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from agreement import attention_agrees
from inputs import DTYPES, slowly, to_torch

from kvcluster import fast
from kvcluster.fast.attention import attend_entries
from kvcluster.fast.backends import cell
from kvcluster.fast.cpu.compiling import library
from kvcluster.fast.plain import attention as plain_attention

BACKENDS = ["torch", "cpp", "triton"]


def problem(seed, *, entries, dim=64, group=3, queries=1, dtype="f32", most=100, spread=1.0, batch=1, heads=2):
    """Query rows, keys, values and counts; the new tokens, the last `queries` entries, have count 1."""
    rng = np.random.default_rng(seed)
    query = spread * rng.standard_normal((batch, heads, group * queries, dim))
    keys, values = rng.standard_normal((2, batch, heads, entries, dim))
    counts = rng.integers(1, most + 1, (batch, heads, entries)).astype(np.int32)
    counts[..., entries - queries :] = 1
    return tuple(map(to_torch, [*(array.astype(DTYPES[dtype]) for array in (query, keys, values)), counts]))


def agrees(output, query, keys, values, counts, queries=1):
    """Every row against the oracle on the entries that it may see."""
    entries = keys.shape[-2]
    return all(
        attention_agrees(
            output[..., token::queries, :],
            query[..., token::queries, :],
            *(array[..., : entries - queries + token + 1, :] for array in (keys, values)),
            counts[..., : entries - queries + token + 1],
        )
        for token in range(queries)
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("entries", "dim", "group", "queries"),
    [
        (1, 64, 1, 1),
        (2, 64, 3, 2),
        (63, 80, 4, 1),
        (64, 128, 3, 1),
        (65, 16, 9, 5),
        slowly(300, 64, 5, 7),
        (257, 256, 2, 1),
    ],
)
def test_every_backend_is_within_the_bound(backend, dtype, entries, dim, group, queries, few_programs):
    arrays = problem(entries, entries=entries, dim=dim, group=group, queries=queries, dtype=dtype)
    assert agrees(attend_entries(*arrays, queries=queries, backend=backend), *arrays, queries)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_counts_and_large_logits_are_within_the_bound(backend, dtype, few_programs):
    arrays = problem(1, entries=200, most=100_000, spread=1e3 if dtype == "f16" else 1e4, dtype=dtype)
    assert agrees(attend_entries(*arrays, backend=backend), *arrays)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", "cpp", pytest.param("triton", marks=pytest.mark.slow)])
def test_forty_thousand_entries_are_within_the_bound(backend, few_programs):
    arrays = problem(2, entries=40_000, heads=1, most=100_000, spread=3.0)
    assert agrees(attend_entries(*arrays, backend=backend), *arrays)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_wrong_twins_are_out_of_bound(backend, dtype, few_programs):
    query, keys, values, counts = arrays = problem(3, entries=30, queries=5, most=3, dtype=dtype)

    def attend(*arrays, **options):
        return attend_entries(*arrays, backend=backend, **{"queries": 5} | options)

    twins = {
        "log counts dropped": attend(query, keys, values, None),
        "counts one entry late": attend(query, keys, values, counts.roll(1, -1)),
        "new tokens see each other": attend(*arrays, queries=1),
        "the last entry missed": attend(query, keys[:, :, :-1], values[:, :, :-1], counts[:, :, :-1]),
        "heads confused": attend(query.flip(1), keys, values, counts),
        "queries before groups": attend(query.unflatten(2, (5, 3)).transpose(2, 3).flatten(2, 3), keys, values, counts),
        "scale forgotten": attend(*arrays, scale=1.0),
    }
    assert agrees(attend(*arrays), *arrays, 5)
    for name, output in twins.items():
        assert not agrees(output, *arrays, 5), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_entry_of_count_zero_takes_no_part(backend, few_programs):
    query, keys, values, counts = problem(4, entries=150)
    counts[..., :70] = 0  # a whole block of the C++ loop, and of a program
    kept = attend_entries(query, keys[:, :, 70:], values[:, :, 70:], counts[..., 70:], backend=backend)
    assert agrees(attend_entries(query, keys, values, counts, backend=backend), query, keys, values, counts)
    assert agrees(kept, query, keys, values, counts)


@pytest.mark.parametrize("backend", ["cpp", "triton"])
def test_strides_do_not_matter(backend, few_programs):
    """Views into a cache with room to grow, heads and tokens swapped, features apart: the same bits."""
    query, keys, values, counts = problem(5, entries=40, batch=2)
    expected = attend_entries(query, keys, values, counts, backend=backend)
    roomy = [torch.nn.functional.pad(x, (0, 0, 0, 9))[:, :, :40] for x in (keys, values)]
    swapped = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (keys, values)]
    apart = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (keys, values)]
    wide_counts = counts[..., None].repeat(1, 1, 1, 2)[..., 0]
    for views in (roomy, swapped, apart):
        assert torch.equal(attend_entries(query, *views, wide_counts, backend=backend), expected)


def test_the_number_of_threads_changes_no_bit():
    arrays = problem(6, entries=5000, queries=30)
    before, outputs = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            outputs.append(attend_entries(*arrays, queries=30, backend="cpp"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*outputs)


def test_torch_in_pieces_is_torch_at_once(monkeypatch):
    arrays = problem(7, entries=50, queries=20)
    whole = attend_entries(*arrays, queries=20, backend="torch")
    monkeypatch.setattr(plain_attention, "WORKING_BYTES", 3000)
    assert agrees(attend_entries(*arrays, queries=20, backend="torch"), *arrays, 20)
    assert whole.shape == attend_entries(*arrays, queries=20, backend="torch").shape


def test_gradients_are_torchs():
    query, keys, values, counts = (array[0] for array in problem(8, entries=10))
    query.requires_grad_()
    fast.clustered_attention(query, keys, values, counts).sum().backward()
    assert query.grad is not None
    for backend in ("cpp", "triton"):
        with pytest.raises(ValueError, match=f"backend '{backend}' computes no gradients"):
            fast.clustered_attention(query, keys, values, counts, backend=backend)


def test_what_cpp_does_not_take_is_refused_and_left_to_torch_by_auto():
    query, keys, values, counts = (array[0] for array in problem(9, entries=10, dim=24))
    with pytest.raises(ValueError, match="must be equal and a multiple of 16, got 24 and 24, for backend 'cpp'"):
        fast.clustered_attention(query, keys, values, counts, backend="cpp")
    assert attention_agrees(fast.clustered_attention(query, keys, values, counts), query, keys, values, counts)
    query, keys, values, counts = (array[0] for array in problem(9, entries=10))
    with pytest.raises(ValueError, match="keys and values must have one dtype"):
        fast.clustered_attention(query, keys, values.half(), counts, backend="cpp")
    with pytest.raises(ValueError, match="backend must be 'auto', 'torch', 'triton' or 'cpp', got 'cuda'"):
        fast.attention(query, keys, values, backend="cuda")
    with pytest.raises(ValueError, match=r"counts must be below 2\*\*31"):
        fast.clustered_attention(query, keys, values, counts.long() * 2**31)


NO_COMPILER = """
import os, sys, warnings
import torch
from kvcluster import fast
query, keys = torch.ones(1, 1, 16), torch.ones(1, 3, 16)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    fast.attention(query, keys, keys)
print(len(caught), *(str(warning.message)[:50] for warning in caught))
try:
    fast.attention(query, keys, keys, backend="cpp")
except (ModuleNotFoundError, RuntimeError) as error:
    print(type(error).__name__, str(error)[:60])
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "compiler", "expected"),
    [
        ("", "", ["0", "ModuleNotFoundError backend 'cpp' needs a C++ compiler"]),
        (None, "false", ["1 attention on the CPU is slower than it could be", "RuntimeError the C++ compiler failed"]),
    ],
    ids=["none", "broken"],
)
def test_without_a_compiler_torch_does_the_work_and_cpp_says_why_not(path, compiler, expected, tmp_path, monkeypatch):
    if path is not None:
        monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", compiler)
    done = subprocess.run([sys.executable, "-c", NO_COMPILER], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for line, start in zip(done.stdout.splitlines(), expected, strict=True):
        assert line.startswith(start)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n_tokens", [3, 100])
def test_a_key_whose_product_is_no_number_is_not_left_out(backend, n_tokens):
    """Both products of one key overflow, one each way: whatever the order, their sum is not a number."""
    keys, values, query = (torch.ones(1, 1, n, 16) for n in (n_tokens, n_tokens, 2))
    assert cell("attend", backend)(10 * query, keys, values, None, 1, 0.25).isfinite().all()
    keys[..., 1, :2] = torch.tensor([3e38, -3e38])
    assert cell("attend", backend)(10 * query, keys, values, None, 1, 0.25).isnan().all()


def test_loading_the_library_does_not_flush_subnormal_numbers():
    library("attention")
    assert (torch.full((64,), 1e-40) * 1.0).count_nonzero() == 64
    assert (np.full(64, 1e-40, dtype=np.float32) * np.float32(1)).all()
