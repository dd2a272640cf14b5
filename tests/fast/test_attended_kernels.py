"""Attended matching by Triton kernels, interpreted where there is no GPU: the reference's bits."""

import numpy as np
import pytest
import torch
from inputs import DTYPES, DTYPES_AND_KINDS, make_keys, skip_what_the_interpreter_misreads, to_torch

from kvcluster import fast, reference
from kvcluster.fast.kernels import attended_matching as attended
from kvcluster.reference.attended_matching import attention_margins

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RULES = {"keep_ratio": 0.4, "chunk_size": 20, "n_shared": 3}

pytestmark = pytest.mark.usefixtures("few_programs")


def arrays(kind, shape, chunk_size, dtype="f32", n_queries=3):
    of_chunks = (*shape[:-2], shape[-2] // chunk_size, n_queries, shape[-1])
    keys, values = (make_keys(kind, shape, DTYPES[dtype], seed) for seed in (0, 1))
    return keys, values, make_keys("normal", of_chunks, DTYPES[dtype], 2)


def by_kernels(*given, **rules):
    return fast.attended_matching(*(to_torch(array).to(DEVICE) for array in given), **rules, backend="triton")


@pytest.mark.parametrize(("dtype", "kind"), DTYPES_AND_KINDS)
def test_kernels_have_the_reference_bits_for_tokens_of_every_kind(dtype, kind):
    skip_what_the_interpreter_misreads(kind, DTYPES[dtype])
    given = arrays(kind, (2, 2, 43, 16), 20, dtype)
    expected, found = reference.attended_matching(*given, **RULES), by_kernels(*given, **RULES)
    assert np.array_equal(found.labels.cpu(), expected.labels)
    assert np.array_equal(found.counts.cpu(), expected.counts)


@pytest.mark.parametrize("lead", [(), (0, 2), (2, 0)])
def test_kernels_take_any_leading_axes(lead):
    given = arrays("normal", (*lead, 43, 24), 20)
    expected, found = reference.attended_matching(*given, **RULES), by_kernels(*given, **RULES)
    assert np.array_equal(found.labels.cpu(), expected.labels)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kernel_has_the_bits_of_the_margins(dtype, monkeypatch):
    """Also of keys that are no copy, and in parts."""
    keys, _, queries = arrays("normal", (3, 26, 24), 26, dtype, n_queries=4)
    expected = attention_margins(keys[:, ::2], queries[:, 0])
    there = to_torch(keys).to(DEVICE)[:, ::2], to_torch(queries[:, 0]).to(DEVICE)
    for most in (attended.WORKING_BYTES, 1):
        monkeypatch.setattr(attended, "WORKING_BYTES", most)
        assert np.array_equal(attended.attention_margins(*there).cpu(), expected)


WRONG = {
    "no other token": lambda right, dots: dots.amax(dim=1),
    "the first query alone": lambda right, dots: right(dots[:, :1]),
    "sums in float32": lambda right, dots: right(dots.float().double()),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_twins_are_told_apart(name, monkeypatch):
    keys, _, queries = arrays("normal", (3, 26, 24), 26, n_queries=4)
    there = to_torch(keys).to(DEVICE), to_torch(queries[:, 0]).to(DEVICE)
    right = attended.largest_margins
    monkeypatch.setattr(attended, "largest_margins", lambda dots: WRONG[name](right, dots))
    assert not np.array_equal(attended.attention_margins(*there).cpu(), attention_margins(keys, queries[:, 0]))
