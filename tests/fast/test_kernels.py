"""The Triton kernels, interpreted where there is no GPU: the reference's bits, and the same refusals."""

import subprocess
import sys

import pytest
import torch
from agreement import assert_same_bits
from inputs import DTYPES, DTYPES_AND_KINDS, make_keys, skip_what_the_interpreter_misreads, slowly, to_torch

from kvcluster import fast, reference
from kvcluster.fast.backends import choose
from kvcluster.fast.kernels import match as match_module

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def on_device(array):
    return to_torch(array).to(DEVICE)


def assert_kernels_agree(keys, **parameters):
    """Labels, counts and centroids of keys and of other values."""
    expected = reference.chunked_soft_matching(keys, **parameters)
    ours = fast.chunked_soft_matching(on_device(keys), **parameters, backend="triton")
    assert_same_bits(ours.labels.cpu(), expected.labels)
    assert_same_bits(ours.counts.cpu(), expected.counts)
    assert_same_bits(fast.merge(on_device(keys), ours, backend="triton").cpu(), reference.merge(keys, expected))


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "kind"), DTYPES_AND_KINDS)
def test_kernels_have_the_reference_bits_for_keys_of_every_kind(dtype, kind):
    skip_what_the_interpreter_misreads(kind, DTYPES[dtype])
    assert_kernels_agree(make_keys(kind, (2, 65, 64), DTYPES[dtype], seed=1), keep_ratio=0.2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [slowly(1), 5, slowly(64), 80, slowly(128), slowly(256)])
def test_kernels_take_any_dim_up_to_256(dim, dtype):
    assert_kernels_agree(make_keys("smooth", (128, dim), DTYPES[dtype], seed=dim), keep_ratio=0.25)


@pytest.mark.parametrize("chunk_size", [1, slowly(2), 7, slowly(8), slowly(62), slowly(128), slowly(512)])
def test_kernels_take_any_chunk_size(chunk_size):
    kind = "signs" if chunk_size < 100 else "normal"
    keys = make_keys(kind, (2, max(20, chunk_size) + 3, 16), DTYPES["f32"], seed=chunk_size)
    assert_kernels_agree(keys, keep_ratio=0.3, chunk_size=chunk_size)


def test_kernels_read_strided_tensors_in_place():
    keys = make_keys(
        "smooth", (2, 64, 3, 32), DTYPES["f16"], seed=2
    )  # (batch, tokens, heads, dim), as projections give
    expected = reference.chunked_soft_matching(keys.transpose(0, 2, 1, 3).copy(), keep_ratio=0.25)
    strided = on_device(keys).transpose(1, 2)
    ours = fast.chunked_soft_matching(strided, keep_ratio=0.25, backend="triton")
    assert_same_bits(ours.labels.cpu(), expected.labels)
    merged = fast.merge(strided, ours, backend="triton").cpu()
    assert_same_bits(merged, reference.merge(keys.transpose(0, 2, 1, 3).copy(), expected))


@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_fill_caches_with_the_reference_bytes(dtype):
    keys, values = (make_keys("normal", (2, 150, dim), DTYPES[dtype], seed=dim) for dim in (16, 24))
    parameters = {"keep_ratio": 0.2, "chunk_size": 32, "n_recent": 16}
    cache, expected = fast.ClusteredCache(**parameters, backend="triton"), reference.ClusteredCache(**parameters)
    for first, last in ((0, 100), (100, 101), (101, 150)):
        cache.append(on_device(keys)[:, first:last], on_device(values)[:, first:last])
        expected.append(keys[:, first:last], values[:, first:last])
    for name in ("keys", "values", "counts"):
        assert_same_bits(getattr(cache, name).cpu(), getattr(expected, name))


@pytest.mark.slow
@pytest.mark.parametrize("twin", ["no certificate", "no canonical score at the cut"])
def test_wrong_twins_of_the_kernels_are_told_apart(twin, few_programs, monkeypatch):
    """Without margin the float32 filter decides alone; without scores at the cut, the first sources merge."""
    keys = make_keys("near_ties", (256, 64), DTYPES["f32"], seed=3)
    assert_kernels_agree(keys, keep_ratio=0.2)
    if twin == "no certificate":
        monkeypatch.setattr(match_module, "margin", lambda dim, unit: 0.0 * dim * unit - 1.0)
    else:
        right = fast.exact.chunks.renumber
        monkeypatch.setattr(
            "kvcluster.fast.kernels.soft_matching.renumber",
            lambda destination, best_first, size, n_merged: right(
                destination, None if best_first is None else best_first.sort(dim=-1).values, size, n_merged
            ),
        )
    with pytest.raises(AssertionError):
        assert_kernels_agree(keys, keep_ratio=0.2)


def test_an_explicit_backend_is_never_replaced(monkeypatch):
    keys = torch.ones(64, 300)
    with pytest.raises(ValueError, match="backend must be 'auto', 'torch', 'triton' or 'cpp', got 'cuda'"):
        fast.chunked_soft_matching(keys, keep_ratio=0.5, backend="cuda")
    with pytest.raises(ValueError, match="dim must be at most 256 for backend 'triton', got 300"):
        fast.chunked_soft_matching(keys, keep_ratio=0.5, backend="triton")
    monkeypatch.setattr("triton.knobs.runtime.interpret", False)
    with pytest.raises(ValueError, match="backend 'triton' needs CUDA tensors, or TRITON_INTERPRET=1"):
        fast.merge(keys[:, :5], fast.chunked_soft_matching(keys, keep_ratio=0.5), backend="triton")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="backend 'triton' needs the package triton"):
        fast.chunked_soft_matching(keys[:, :5], keep_ratio=0.5, backend="triton")
    assert choose("kmeans", "auto", keys) == choose("merge", "torch", keys) == "torch"


@pytest.mark.slow
def test_torch_works_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, kvcluster.fast as fast\n"
        "fast.chunked_soft_matching(torch.ones(64, 4), keep_ratio=0.5)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


@pytest.mark.parametrize("backend", ["torch", "triton", "cpp"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda keys: keys.double(), "keys must be float16, bfloat16 or float32, got float64"),
        (lambda keys: keys / 0, "keys must be finite"),
        (lambda keys: keys[:, :0], "keys must have dim >= 1"),
        (lambda keys: keys[0], r"keys must have shape \(..., tokens, dim\)"),
    ],
)
def test_all_backends_refuse_the_same_keys(backend, change, message):
    with pytest.raises(ValueError, match=message):
        fast.chunked_soft_matching(change(torch.ones(64, 4)), keep_ratio=0.5, backend=backend)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_no_tokens_give_an_empty_clustering(backend):
    keys = torch.ones(2, 0, 4, device=DEVICE)
    clustering = fast.chunked_soft_matching(keys, keep_ratio=0.5, backend=backend)
    assert clustering.labels.shape == clustering.counts.shape == (2, 0)
    assert fast.merge(keys, clustering, backend=backend).shape == (2, 0, 4)


@pytest.mark.parametrize("name", ["chunked_soft_matching", "merge"])
def test_operators_tell_the_truth_about_themselves(name):
    """PyTorch's own check of schema, fake kernel and dispatch."""
    keys = torch.randn(2, 70, 8)
    clustering = fast.chunked_soft_matching(keys, keep_ratio=0.5)
    arguments = {
        "chunked_soft_matching": (keys, 32, 64, "torch"),
        "merge": (keys, clustering.labels, clustering.counts, "torch"),
    }[name]
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(getattr(torch.ops.kvcluster, name).default, arguments, test_utils=tests)


class Compress(torch.nn.Module):
    def forward(self, keys):
        clustering = fast.chunked_soft_matching(keys, keep_ratio=0.25, chunk_size=16)
        return fast.merge(keys, clustering), clustering.counts


def test_operators_survive_compile_and_export():
    keys = torch.randn(2, 3, 70, 8, generator=torch.Generator().manual_seed(0))
    expected = Compress()(keys)
    compiled = torch.compile(Compress(), fullgraph=True, backend="aot_eager")(keys)
    exported = torch.export.export(Compress(), (keys,)).module()(keys)
    for ours in (compiled, exported):
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
