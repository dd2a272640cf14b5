"""A million rows and more: reference, torch, C++ and Triton must give the same labels, counts and centroids.

A row is a source that looks for its destination. The wrong twin, a plain float32 argmax, gets the same rows.
"""

import numpy as np
import pytest
import torch
from agreement import assert_same_bits
from inputs import DTYPES, make_keys, skip_what_the_interpreter_misreads, to_torch

from kvcluster import reference
from kvcluster.fast import SoftMatching

pytestmark = pytest.mark.slow

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# kind, dtype, dim, chunk_size, keep_ratio, chunks; several of a kind differ by their seed
SLABS = [
    *(("normal", dtype, 64, 256, 0.5, 320) for dtype in DTYPES for _ in range(8)),
    *(("normal", dtype, 80, 128, 0.25, 64) for dtype in DTYPES),
    *(("smooth", dtype, 128, 64, 0.2, 32) for dtype in DTYPES),
    *((kind, dtype, 64, 64, 0.25, 16) for dtype in DTYPES for kind in ("signs", "duplicates", "near_ties")),
    *((kind, dtype, 64, 64, 0.2, 16) for dtype in DTYPES for kind in ("zeros", "huge", "tiny")),
    *(("normal", dtype, 17, 8, 0.3, 64) for dtype in DTYPES),
]


def compare(keys: np.ndarray, chunk_size: int, keep_ratio: float) -> int:
    """Rows in keys (tokens, dim), whole chunks, after all four agreed to the last bit."""
    expected = reference.chunked_soft_matching(keys, keep_ratio=keep_ratio, chunk_size=chunk_size)
    centroids = reference.merge(keys, expected)
    chunks = len(keys) // chunk_size
    target = len(expected.counts) // chunks
    labels = expected.labels.reshape(chunks, chunk_size) - target * np.arange(chunks)[:, None]
    for backend, device in (("torch", "cpu"), ("cpp", "cpu"), ("triton", DEVICE)):
        sizes = {"chunk_size": chunk_size, "target": target}
        made = SoftMatching().compress(to_torch(keys).to(device), None, **sizes, backend=backend)
        assert_same_bits(made.labels.cpu(), labels)
        assert_same_bits(made.counts.cpu().reshape(-1), expected.counts)
        assert_same_bits(made.keys.cpu().reshape(centroids.shape), centroids)
    return made.n_rows


def slab_keys(slab: int) -> np.ndarray:
    kind, dtype, dim, chunk_size, _, chunks = SLABS[slab]
    return make_keys(kind, (chunks, chunk_size, dim), DTYPES[dtype], seed=slab).reshape(-1, dim)


@pytest.mark.parametrize("slab", range(len(SLABS)), ids=lambda i: f"{i}-" + "-".join(map(str, SLABS[i])))
def test_fuzz_random_rows(slab, few_programs, record_property):
    kind, dtype, _, chunk_size, keep_ratio, _ = SLABS[slab]
    skip_what_the_interpreter_misreads(kind, DTYPES[dtype])
    record_property("rows", compare(slab_keys(slab), chunk_size, keep_ratio))


def test_the_slabs_have_a_million_rows():
    """Counted in the first round alone."""
    assert sum(chunk_size // 2 * chunks for _, _, _, chunk_size, _, chunks in SLABS) >= 900_000


def test_the_wrong_twin_differs_on_the_same_rows():
    """A plain float32 argmax, normalised keys and a matrix product, against canonical matches in the first round."""
    differing = 0
    for slab, (_, dtype, dim, chunk_size, _, _) in enumerate(SLABS):
        if dtype != "f32":
            continue
        keys = slab_keys(slab).reshape(-1, chunk_size, dim)[:8]
        unit = torch.nn.functional.normalize(to_torch(keys), dim=-1)
        plain = (unit[:, 0::2] @ unit[:, 1::2].mT).argmax(dim=-1).numpy()
        canonical = reference.similarity(keys[:, 0::2], keys[:, 1::2]).argmax(axis=-1)
        differing += int((plain != canonical).sum())
    assert differing > 0
