"""Pooled matching: torch, Triton (interpreted where there is no GPU) and C++ against the reference, to the bit."""

import dataclasses

import numpy as np
import pytest
import torch
from agreement import assert_same_bits
from inputs import DTYPES, KINDS, make_keys, skip_what_the_interpreter_misreads, slowly, to_torch
from patches import twin_of
from products import prefer_the_last
from stored_entries import DEVICE, agrees, assert_agrees, compressed, stored

from kvcluster import fast, reference
from kvcluster.fast.backends import choose, implementation
from kvcluster.fast.exact import pooled
from kvcluster.fast.kernels import match as match_module
from kvcluster.fast.kernels import pooled_matching as by_kernels
from kvcluster.fast.plain import pooled_matching as by_torch
from kvcluster.reference import pooled_matching as definition
from kvcluster.reference.soft_matching import match_round

pytestmark = pytest.mark.usefixtures("few_programs")

PROCESSOR = ("torch", "cpp")
BACKENDS = ("torch", slowly("triton"), "cpp")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_entries_have_the_reference_bits_for_keys_of_every_kind(backend, dtype, kind):
    if backend == "triton":
        skip_what_the_interpreter_misreads(kind, DTYPES[dtype])
    assert_agrees(backend, stored(kind, (1, 2, 65, 16), dtype, seed=1), target=20, chunk_size=16)
    assert_agrees(backend, stored(kind, (2, 1, 26, 80), dtype, seed=2), target=12, chunk_size=5)


@pytest.mark.parametrize("chunk_size", [2, 5, 16, 256])
@pytest.mark.parametrize("entries", [2, 3, 63, 64, 65, 257, slowly(1000)])
@pytest.mark.parametrize("backend", PROCESSOR)
def test_entries_of_any_number_have_the_reference_bits(backend, entries, chunk_size):
    """One step, and several; an entry alone in the last chunk finds none."""
    arrays = stored("smooth", (1, 2, entries, 16), seed=entries)
    for target in sorted({1, entries // 5 + 1, (entries + 1) // 2, entries - 1}):
        assert_agrees(backend, arrays, target=target, chunk_size=chunk_size)


@pytest.mark.parametrize(
    ("entries", "chunk_size", "target"),
    [
        (2, 2, 1),
        (3, 2, 1),
        (21, 5, 20),
        slowly(21, 5, 3),
        slowly(65, 16, 40),
        slowly(64, 256, 9),
        slowly(257, 256, 256),
    ],
)
def test_kernels_take_entries_of_any_number(entries, chunk_size, target):
    assert_agrees("triton", stored("normal", (2, 1, entries, 8), seed=entries), target=target, chunk_size=chunk_size)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_dims_of_keys_and_values_may_differ(backend):
    keys, _, counts = stored("normal", (2, 2, 19, 6), "bf16")
    values = make_keys("normal", (2, 2, 19, 3), DTYPES["bf16"], seed=1)
    assert_agrees(backend, (keys, values, counts), target=7, chunk_size=6)


@pytest.mark.parametrize(
    ("batch", "heads", "entries", "target"), [(0, 2, 20, 7), (2, 0, 20, 7), (2, 0, 20, 10), (0, 1, 3, 3), (1, 2, 0, 1)]
)
@pytest.mark.parametrize("backend", ["torch", "triton", "cpp"])
def test_nothing_to_do_is_done(backend, batch, heads, entries, target):
    assert_agrees(backend, stored("normal", (batch, heads, entries, 16)), target=target, chunk_size=4)


@pytest.mark.parametrize("backend", ["torch", "triton", "cpp"])
def test_as_few_entries_as_wanted_stay_as_they_are(backend):
    arrays = stored("zeros", (2, 2, 12, 16), "f16")
    arrays[0][...] = -np.abs(arrays[0])  # has negative zeros
    for target in (12, 30):
        assert_agrees(backend, arrays, target=target, chunk_size=4)


@pytest.mark.parametrize("backend", ["torch", "triton", "cpp"])
def test_signs_of_zeros_survive(backend):
    """Means of negative zeros are negative, of both kinds positive."""
    keys = np.float32([[[[1, -0.0], [1, -0.0], [-1, -0.0], [-1, 0.0], [9, 9], [1, -9]]]]).repeat(8, axis=-1)
    arrays = keys, keys, np.full((1, 1, 6), 3, dtype=np.int32)
    assert_agrees(backend, arrays, target=4, chunk_size=2)
    made = compressed(backend, arrays, target=4, chunk_size=2)[0]
    assert made[0, 0, :2, -1].signbit().tolist() == [True, False]


@pytest.mark.parametrize("backend", ["torch", "triton", "cpp"])
def test_strided_tensors_give_the_same_bits_and_stay_as_they_are(backend):
    """As projections lay them, in a part of a larger memory, and transposed."""
    arrays = stored("normal", (2, 3, 24, 16), "f16")
    expected = definition.compress_entries(*arrays, target=7, chunk_size=10)
    keys, values, counts = (to_torch(array).to(DEVICE if backend == "triton" else "cpu") for array in arrays)
    memory = torch.zeros(2, 3, 99, 16, dtype=torch.float16, device=keys.device)
    memory[:, :, 5:29] = values
    strided = keys.transpose(1, 2).contiguous().transpose(1, 2), memory[:, :, 5:29], counts.mT.contiguous().mT
    made = implementation("pooled_matching", backend, keys, values)(*strided, target=7, chunk_size=10)
    other = implementation("pooled_matching", backend, keys, values)(
        keys.mT.contiguous().mT, values, counts, target=7, chunk_size=10
    )
    for name, array in zip(("keys", "values", "counts"), expected, strict=True):
        assert_same_bits(getattr(made, name).cpu(), array)
        assert_same_bits(getattr(other, name).cpu(), array)
    for tensor, array in zip((keys, memory[:, :, 5:29], counts), arrays, strict=True):
        assert_same_bits(tensor.cpu(), array)


@pytest.mark.parametrize("backend", PROCESSOR)
def test_work_in_parts_gives_the_same_bits(backend, monkeypatch):
    for module in (pooled, by_torch, fast.exact.similarity, fast.exact.mean):
        monkeypatch.setattr(module, "WORKING_BYTES", 1)
    assert_agrees(backend, stored("signs", (2, 2, 43, 16)), target=12, chunk_size=8)


def test_autocast_and_imprecise_products_change_no_bit():
    arrays = stored("near_ties", (1, 2, 90, 64))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_agrees("torch", arrays, target=30, chunk_size=32)
    torch.set_float32_matmul_precision("medium")
    try:
        assert_agrees("torch", arrays, target=30, chunk_size=32)
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("backend", ["torch", "triton", "cpp"])
def test_with_one_chunk_it_is_a_round_of_soft_matching(backend):
    keys, values, _ = stored("normal", (1, 1, 30, 16))
    labels = match_round(keys[0, 0], n_merged=11)
    expected = reference.merge(keys[0, 0], reference.Clustering(labels, np.bincount(labels)))
    ones = np.ones((1, 1, 30), dtype=np.int32)
    made = compressed(backend, (keys, values, ones), target=19, chunk_size=30)
    assert_same_bits(made[0][0, 0], expected)
    assert made[2][0, 0].tolist() == np.bincount(labels).tolist()


def test_rows_are_sources_of_all_steps():
    """Steps of 43, 22 and 11 entries in chunks of 8 match 20 + 2, 8 + 3 and 4 + 2 sources."""
    keys, values, counts = map(to_torch, stored("signs", (1, 2, 43, 16)))
    for backend in PROCESSOR:
        made = implementation("pooled_matching", backend, keys, values)(keys, values, counts, target=9, chunk_size=8)
        assert made.n_rows == 2 * (22 + 11 + 6)
        assert 0 < made.n_scored_rows <= made.n_rows
    assert pooled.source_entries(43, 8).tolist() == list(range(0, 43, 2))
    assert pooled.source_entries(11, 5).tolist() == [0, 2, 4, 5, 7, 9]


def test_a_processor_with_a_compiler_prefers_cpp(monkeypatch):
    keys = torch.ones(1, 1, 4, 16)
    assert choose("pooled_matching", "auto", keys, keys) == "cpp"
    assert choose("pooled_matching", "auto", keys[..., :9], keys[..., :9]) == "torch"
    monkeypatch.setattr("kvcluster.fast.backends.has_cpp", lambda name: False)
    assert choose("pooled_matching", "auto", keys, keys) == "torch"


MERGED = "keys, values, counts = merge_stored(keys, values, counts, labels, size - n_merged)"
LOOP = "    while counts.shape[-1] > target:"
STABLE = 'np.argsort(-np.concatenate(similarities), kind="stable")'
RANKS = 'np.concatenate([np.argsort(np.argsort(-s, kind="stable")) for s in similarities])'
WRONG = {
    "an equal number in each chunk": [("best_first[:n_merged]", f'np.argsort({RANKS}, kind="stable")[:n_merged]')],
    "means without weights": [
        (
            MERGED,
            f"before, ones = (keys, values), counts * 0 + 1; {MERGED}; "
            "keys, values, _ = merge_stored(*before, ones, labels, size - n_merged)",
        )
    ],
    "ties between matches: the last": [(STABLE, STABLE.replace("-np", "np") + "[::-1]")],
    "ties between destinations: the last": [
        ("similar.argmax(axis=-1)", "len(chunk_destinations) - 1 - similar[:, ::-1].argmax(axis=-1)")
    ],
    "the last chunk left out": [("range(0, len(centroids) - 1, ", "range(0, len(centroids) - chunk_size + 1, ")],
    "no rounding between steps": [
        (LOOP, f"    given, joined = (keys, values, counts), np.arange(counts.shape[-1]) + 0 * counts\n{LOOP}"),
        (
            MERGED,
            "joined = np.take_along_axis(labels, joined, -1); "
            "keys, values, counts = merge_stored(*given, joined, size - n_merged)",
        ),
    ],
}


def twin_of_the_reference(name):
    """The reference with one mistake."""
    return twin_of(definition, *WRONG[name])["compress_entries"]


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("backend", BACKENDS)
def test_wrong_twins_of_the_reference_are_told_apart(backend, name):
    compress = twin_of_the_reference(name)
    cases = [(stored(kind, (1, 2, 38, 16)), target) for target in (26, 16) for kind in ("signs", "normal")]
    assert all(agrees(backend, arrays, target=target, chunk_size=8) for arrays, target in cases)
    assert not all(agrees(backend, arrays, compress, target=target, chunk_size=8) for arrays, target in cases)


def float32_matches(sources, destinations):
    """The filter alone, believed."""
    unit = [torch.nn.functional.normalize(keys, dim=-1) for keys in (sources, destinations)]
    found = fast.exact.similarity.certified_matches(sources, destinations)
    return dataclasses.replace(found, destination=(unit[0] @ unit[1].mT).argmax(dim=-1))


def float32_cut(matches, sources, destinations, n_top):
    return matches.cosine.argsort(dim=-1, descending=True, stable=True)[:, :n_top]


@pytest.mark.parametrize(("name", "twin"), [("certified_matches", float32_matches), ("certified_top", float32_cut)])
def test_a_filter_that_is_believed_is_told_apart(name, twin, monkeypatch):
    arrays, rules = stored("near_ties", (1, 2, 200, 64)), {"target": 70, "chunk_size": 64}
    prefer_the_last(monkeypatch)
    assert_agrees("torch", arrays, **rules)
    monkeypatch.setattr(by_torch, name, twin)
    with pytest.raises(AssertionError):
        assert_agrees("torch", arrays, **rules)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["no certificate", "means without weights", "the first sources merge"])
def test_wrong_twins_of_the_kernels_are_told_apart(name, monkeypatch):
    arrays, rules = stored("near_ties", (1, 1, 70, 64)), {"target": 40, "chunk_size": 64}
    assert_agrees("triton", arrays, **rules)
    if name == "no certificate":
        monkeypatch.setattr(match_module, "margin", lambda *_: -1.0)
    elif name == "means without weights":
        merge = by_kernels.merge
        monkeypatch.setattr(by_kernels, "merge", lambda array, labels, members, _: merge(array, labels, members))
    else:
        score = by_kernels.score
        monkeypatch.setattr(by_kernels, "score", lambda *of: score(*of) * 0)
    with pytest.raises(AssertionError):
        assert_agrees("triton", arrays, **rules)
