"""Distinctive matching by Triton kernels, interpreted where there is no GPU: the reference's bits."""

import numpy as np
import pytest
import torch
from agreement import assert_same_bits
from inputs import DTYPES, DTYPES_AND_KINDS, make_keys, skip_what_the_interpreter_misreads, to_torch
from patches import twin_of

from kvcluster import fast, reference
from kvcluster.fast.kernels import distinctive_matching as distinctive
from kvcluster.fast.kernels import likeness
from kvcluster.reference.distinctive_matching import likeness_to_mean

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SETTINGS = {"keep_ratio": 0.4, "chunk_size": 20, "n_shared": 3}


pytestmark = pytest.mark.usefixtures("few_programs")


def pair(kind, shape, dtype="f32", seed=0, dim_value=None):
    sizes = shape, (*shape[:-1], dim_value or shape[-1])
    return [make_keys(kind, size, DTYPES[dtype], seed + number) for number, size in enumerate(sizes)]


def by_kernels(*arrays, **rules):
    return fast.distinctive_matching(*(to_torch(array).to(DEVICE) for array in arrays), **rules, backend="triton")


def assert_kernels_agree(keys, values, **rules):
    expected, ours = reference.distinctive_matching(keys, values, **rules), by_kernels(keys, values, **rules)
    assert_same_bits(ours.labels.cpu(), expected.labels)
    assert_same_bits(ours.counts.cpu(), expected.counts)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "kind"), DTYPES_AND_KINDS)
def test_kernels_have_the_reference_bits_for_tokens_of_every_kind(dtype, kind):
    skip_what_the_interpreter_misreads(kind, DTYPES[dtype])
    assert_kernels_agree(*pair(kind, (2, 2, 43, 16), dtype, seed=1), **SETTINGS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "dim_value", "rules"),
    [
        ((1, 2, 130, 64), 80, {"keep_ratio": 0.5, "chunk_size": 65, "n_shared": 40}),
        ((3, 64, 80), 64, {"keep_ratio": 0.25, "chunk_size": 64}),
        ((40, 7), 5, {"keep_ratio": 0.1, "chunk_size": 8, "n_shared": 1}),  # no exact token
        ((2, 1, 2, 21, 128), 1, {"keep_ratio": 0.9, "chunk_size": 7, "n_shared": 2}),
        ((0, 2, 40, 8), 8, SETTINGS),
        ((2, 0, 40, 8), 8, SETTINGS),
        ((2, 19, 8), 8, SETTINGS),  # no whole chunk
        ((1, 300, 256), 3, {"keep_ratio": 0.2, "chunk_size": 256}),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, tuple) else None,
)
def test_kernels_take_any_sizes(shape, dim_value, rules):
    assert_kernels_agree(*pair("signs" if len(shape) == 2 else "normal", shape, dim_value=dim_value), **rules)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["normal", "zeros"])
def test_the_kernel_has_the_bits_of_the_scores(kind, dtype):
    """Of a strided tensor too, as the projections of a model give them."""
    (array,) = pair(kind, (1, 2, 3 * 13, 24), dtype)[:1]
    expected = np.stack([likeness_to_mean(chunk) for chunk in array.reshape(-1, 13, 24)])
    there = to_torch(array).to(DEVICE)
    for tokens in (there, there.transpose(1, 2).contiguous().transpose(1, 2)):
        assert_same_bits(likeness.likeness_to_mean(tokens, 13).cpu(), expected)


def test_kernels_and_torch_make_the_same_entries():
    """And count the same rows; which of them need canonical scores is each filter's own business."""
    keys, values = (to_torch(array).to(DEVICE) for array in pair("smooth", (2, 3, 60, 16), "f16", dim_value=9))
    method, sizes = fast.Distinctive(n_shared=3), {"chunk_size": 20, "target": 8}
    ours, theirs = (method.compress(keys, values, **sizes, backend=name) for name in ("triton", "torch"))
    for name in ("labels", "counts", "keys", "values"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert ours.n_rows == theirs.n_rows == 2 * 3 * 3 * (20 - 8)
    assert 0 <= ours.n_scored_rows <= ours.n_rows


@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_fill_caches_with_the_reference_bytes(dtype):
    keys, values = pair("normal", (2, 2, 90, 16), dtype, dim_value=24)
    rules = {"keep_ratio": 0.4, "chunk_size": 20, "n_sink": 2, "n_recent": 9}
    cache = fast.ClusteredCache(**rules, method=fast.Distinctive(n_shared=3), backend="triton")
    expected = reference.ClusteredCache(**rules, method=reference.Distinctive(n_shared=3))
    for span in (np.s_[..., :70, :], np.s_[..., 70:71, :], np.s_[..., 71:, :]):
        cache.append(*(to_torch(array[span]).to(DEVICE) for array in (keys, values)))
        expected.append(keys[span], values[span])
    assert expected.n_clustered == 60
    for name in ("keys", "values", "counts"):
        assert_same_bits(getattr(cache, name).cpu(), getattr(expected, name))


WRONG = {
    "scores in float32": ("chunk_size).reshape(shape)", "chunk_size).float().double().reshape(shape)"),
    "destinations may leave": ("destination[:, destinations] =", "_ ="),
    "the first tokens as destinations": (
        "evenly_spaced(n_shared, ordinary_keys.shape[1], keys.device)",
        "slice(n_shared)",
    ),
    "ties between centroids: the last": (
        "= assign(ordinary_keys, ordinary_keys[:, destinations].float())",
        "= assign(ordinary_keys, ordinary_keys[:, destinations].flip(1).float())"
        "; destination = n_shared - 1 - destination",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", WRONG)
def test_wrong_twins_of_the_kernels_are_told_apart(name, monkeypatch):
    twin = twin_of(distinctive, WRONG[name])
    keys, values = pair("near_ties" if "float32" in name else "signs", (1, 2, 60, 4))
    assert_kernels_agree(keys, values, **SETTINGS)
    for function in ("scores", "compress"):
        monkeypatch.setattr(distinctive, function, twin[function])
    with pytest.raises(AssertionError):
        assert_kernels_agree(keys, values, **SETTINGS)


def test_an_explicit_backend_is_never_replaced(monkeypatch):
    keys, wide = torch.ones(40, 8), torch.ones(40, 300)
    with pytest.raises(ValueError, match="backend must be 'auto', 'torch', 'triton' or 'cpp', got 'cuda'"):
        fast.distinctive_matching(keys, keys, **SETTINGS, backend="cuda")
    with pytest.raises(ValueError, match="dim must be at most 256 for backend 'triton', got 300"):
        fast.distinctive_matching(keys, wide, **SETTINGS, backend="triton")
    monkeypatch.setattr("triton.knobs.runtime.interpret", False)
    with pytest.raises(ValueError, match="backend 'triton' needs CUDA tensors, or TRITON_INTERPRET=1"):
        fast.distinctive_matching(keys, keys, **SETTINGS, backend="triton")
