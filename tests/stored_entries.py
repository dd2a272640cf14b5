"""Entries as a cache stores them, and what pooled matching makes of them, by the reference and by a backend."""

import numpy as np
import torch
from agreement import assert_same_bits
from inputs import DTYPES, make_keys, to_torch

from kvcluster.fast.backends import implementation
from kvcluster.reference.pooled_matching import compress_entries

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def stored(kind, shape, dtype="f32", seed=0, most=9):
    """Keys, values and counts of entries; `shape` is that of the keys."""
    keys, values = (make_keys(kind, shape, DTYPES[dtype], seed + number) for number in range(2))
    return keys, values, np.random.default_rng(seed).integers(1, most + 1, shape[:-1]).astype(np.int32)


def compressed(backend, arrays, **rules):
    """By one backend; three tensors on the CPU."""
    tensors = [to_torch(array).to(DEVICE if backend == "triton" else "cpu") for array in arrays]
    compress = implementation("pooled_matching", backend, *tensors[:2])
    made = compress(*tensors, **rules)
    assert 0 <= made.n_scored_rows <= made.n_rows
    return [array.cpu() for array in (made.keys, made.values, made.counts)]


def assert_agrees(backend, arrays, compress=compress_entries, **rules):
    for ours, expected in zip(compressed(backend, arrays, **rules), compress(*arrays, **rules), strict=True):
        assert_same_bits(ours, expected)


def agrees(backend, arrays, compress=compress_entries, **rules):
    """Whether `assert_agrees` holds."""
    try:
        assert_agrees(backend, arrays, compress, **rules)
    except AssertionError:
        return False
    return True
