"""The C++ of chunked soft matching and merging: the reference's bits, whatever the layout, instructions and threads."""

import os
import platform

import numpy as np
import pytest
import torch
from agreement import assert_same_bits
from inputs import DTYPES, KINDS, make_keys, slowly, to_torch
from recompiled import INSTRUCTIONS, recompile

from kvcluster import fast, reference
from kvcluster.fast import SoftMatching, backends
from kvcluster.fast.cpu import compiling, matching


def assert_agrees(keys, values=None, *, keep_ratio, chunk_size):
    """Labels, counts and both kinds of means of keys and values (..., tokens, dim), NumPy arrays, of C++."""
    expected = reference.chunked_soft_matching(keys, keep_ratio=keep_ratio, chunk_size=chunk_size)
    made = fast.chunked_soft_matching(to_torch(keys), keep_ratio=keep_ratio, chunk_size=chunk_size, backend="cpp")
    assert_same_bits(made.labels, expected.labels)
    assert_same_bits(made.counts, expected.counts)
    arrays = [keys] if values is None else [keys, values]
    means = [reference.merge(array, expected) for array in arrays]
    for array, right in zip(arrays, means, strict=True):
        assert_same_bits(fast.merge(to_torch(array), made, backend="cpp"), right)
    whole, target = keys.shape[-2] // chunk_size, int(np.ceil(keep_ratio * chunk_size))
    in_chunks = [to_torch(array)[..., : whole * chunk_size, :] for array in arrays]
    compressed = SoftMatching().compress(
        in_chunks[0], *in_chunks[1:] or [None], chunk_size=chunk_size, target=target, backend="cpp"
    )
    for chunks, right in zip((compressed.keys, compressed.values), means, strict=False):
        body = right[..., : whole * target, :]
        assert_same_bits(chunks.reshape(body.shape), body)


def agrees(*arrays, **rules):
    try:
        assert_agrees(*arrays, **rules)
    except AssertionError:
        return False
    return True


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 5, 16, 33, slowly(80), slowly(127), slowly(257)])
def test_cpp_has_the_bits_of_the_reference(kind, dtype, dim):
    keys = make_keys(kind, (2, 75, dim), DTYPES[dtype], seed=dim)
    values = make_keys("zeros", (2, 75, dim + 3), DTYPES[dtype], seed=1)
    values = -np.abs(values)  # has negative zeros
    for keep_ratio, chunk_size in ((0.2, 37), (0.5, 16), (1, 8)):
        assert_agrees(keys, values, keep_ratio=keep_ratio, chunk_size=chunk_size)


@pytest.mark.slow
@pytest.mark.parametrize("dim", range(1, 66))
def test_every_dim_has_the_bits_of_the_reference(dim):
    for kind in ("normal", "near_ties", "signs"):
        assert_agrees(make_keys(kind, (40, dim), DTYPES["bf16"], seed=dim), keep_ratio=0.3, chunk_size=20)


def test_rows_are_counted_and_few_are_scored():
    keys = to_torch(make_keys("normal", (3, 128, 32), DTYPES["f32"], seed=1))
    rules = {"chunk_size": 64, "target": 13}
    torchs, cpps = (SoftMatching().compress(keys, None, **rules, backend=name) for name in ("torch", "cpp"))
    assert cpps.n_rows == torchs.n_rows == 6 * (32 + 16 + 8)
    assert cpps.n_scored_rows < 0.05 * cpps.n_rows
    tied = SoftMatching().compress(torch.ones_like(keys), None, **rules, backend="cpp")
    assert tied.n_scored_rows == tied.n_rows


def test_any_layout_is_read_where_it_lies():
    """Every order of axes, and tokens and heads with others between them; features apart are copied."""
    keys = make_keys("smooth", (3, 4, 64, 24), DTYPES["f16"], seed=2)
    expected = reference.chunked_soft_matching(keys, keep_ratio=0.25, chunk_size=32)
    means = reference.merge(keys, expected)
    for axes in ((0, 1, 2, 3), (1, 0, 2, 3), (0, 2, 1, 3), (2, 1, 0, 3), (3, 0, 1, 2)):
        back = tuple(int(axis) for axis in np.argsort(axes))
        wide = torch.full([2 * length for length in keys.transpose(axes).shape], torch.nan, dtype=torch.float16)
        strided = wide[::2, ::2, 1::2, ::2] if axes[3] == 2 else wide[::2, ::2, ::2, : keys.transpose(axes).shape[3]]
        strided.copy_(to_torch(keys.transpose(axes).copy()))
        made = fast.chunked_soft_matching(strided.permute(back), keep_ratio=0.25, chunk_size=32, backend="cpp")
        assert_same_bits(made.labels, expected.labels)
        assert_same_bits(fast.merge(strided.permute(back), made, backend="cpp"), means)


def test_clusters_may_be_anywhere():
    """Merging by labels that no chunk explains, more entries than a task has."""
    rng = np.random.default_rng(3)
    array = make_keys("normal", (2, 500, 19), DTYPES["f32"], seed=3)
    labels = np.stack([rng.permutation(np.concatenate([np.arange(150), rng.integers(0, 150, 350)])) for _ in range(2)])
    counts = np.stack([np.bincount(row, minlength=150) for row in labels])
    ours = fast.merge(to_torch(array), fast.Clustering(to_torch(labels), to_torch(counts)), backend="cpp")
    assert_same_bits(ours, reference.merge(array, reference.Clustering(labels, counts)))


@pytest.mark.parametrize("shape", [(0, 4), (3, 4), (0, 2, 40, 4), (2, 0, 40, 4)])
def test_nothing_to_do_is_no_error(shape):
    assert_agrees(make_keys("normal", shape, DTYPES["f32"], seed=0), keep_ratio=0.5, chunk_size=20)


def test_auto_takes_cpp_and_what_it_does_not_take_goes_to_torch():
    keys = torch.ones(4, 5)
    assert backends.choose("soft_matching", "auto", keys) == backends.choose("merge", "auto", keys) == "cpp"
    negated = torch.complex(keys, keys).conj().imag
    assert negated.is_neg()
    assert backends.choose("soft_matching", "auto", negated) == "torch"
    with pytest.raises(ValueError, match="no negated views, got a negated view, for backend 'cpp'"):
        fast.chunked_soft_matching(negated, keep_ratio=0.5, backend="cpp")


@pytest.fixture
def compile_anew(monkeypatch, tmp_path):
    def anew(*changes, flags=compiling.FLAGS):
        changed = recompile("matching", monkeypatch, tmp_path, *changes, flags=flags)
        monkeypatch.setattr(matching, "library", lambda _: changed)

    return anew


WRONG_IN_CPP = {
    "ties between destinations: the last": ("found > match.similarity", "found >= match.similarity"),
    "ties between sources: the last": (": a < b;", ": a > b;"),
    "no rescoring": ("match.is_scored = !(second < match.cosine - lead);", "match.is_scored = false;"),
    "no rescoring at the cut": (".cosine > lead) return;", ".cosine > -1.0f) return;"),
    "cosines of keys that are too long or too short": ("c.is_safe && norm", "true || norm"),
    "the second best is not remembered": ("is_first ? best[r].first :", "is_first ? best[r].second :"),
    "canonical sums in another order": ("a + stride, b + stride, 2 * stride);\n}", "a + 1, b + 1, 2 * stride);\n}"),
    "the square without its sign": ("std::fabs(product)", "product"),
    "lengths count": ("product * std::fabs(product) / norms", "product"),
    "means in float32": (
        "sums[k][half] += __builtin_convertvector(halves[half], Doubles)",
        "sums[k][half] = __builtin_convertvector(halves[half] + __builtin_convertvector(sums[k][half], HalfOfFloats), "
        "Doubles)",
    ),
    "divided in float32": (
        "sums[k][half] / count, HalfOfFloats)",
        "sums[k][half], HalfOfFloats) / static_cast<float>(count)",
    ),
    "sums start from zero": ("sums[k][1] = -Doubles{}", "sums[k][1] = Doubles{}"),
    "means of the round before": ("members[m] * layout.token + d", "members[0] * layout.token + d"),
    "entries in another order": ("begins[entry] = n_left++", "begins[entry] = size - n_merged - 1 - n_left++"),
    "the last destination left out": (
        "std::min(from + BLOCK, n_destinations);",
        "std::min(from + BLOCK, n_destinations - 1);",
    ),
    "heads in another order": ("head /= lead[2 * axis--]", "head /= lead[2 * axis--] + 1"),
}


def parallel_keys():
    """Of the destinations of each chunk of 34, many are as good as the one that lies 4 further, but for rounding."""
    keys = make_keys("normal", (2, 3, 70, 40), DTYPES["f32"], seed=4)
    for first in (0, 34):
        destinations = keys[..., first + 1 : first + 34 : 2, :]
        for place in (0, 8):
            destinations[..., place + 4 : place + 8, :] = destinations[..., place : place + 4, :] * np.float32(1.1)
    return keys


AWKWARD = [
    parallel_keys(),
    *(
        make_keys(kind, (2, 3, 70, 40), DTYPES["f32"], seed=5)
        for kind in ("normal", "signs", "near_ties", "duplicates", "zeros", "tiny", "huge")
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize("name", WRONG_IN_CPP)
def test_wrong_twins_of_the_cpp_are_told_apart(name, compile_anew):
    values = -np.abs(make_keys("zeros", (2, 3, 70, 8), DTYPES["f32"], seed=6))
    assert all(agrees(keys, values, keep_ratio=0.2, chunk_size=34) for keys in AWKWARD)
    compile_anew(WRONG_IN_CPP[name])
    assert not all(agrees(keys, values, keep_ratio=0.2, chunk_size=34) for keys in AWKWARD)


@pytest.mark.slow
@pytest.mark.parametrize("instructions", INSTRUCTIONS)
def test_cpp_has_the_same_bits_with_any_instructions_and_threads(instructions, compile_anew):
    if instructions != "-march=native" and platform.machine() not in {"x86_64", "AMD64"}:
        pytest.skip("these are instructions of x86-64 processors")
    shared = ("LARGE_CHUNK = 2048", "LARGE_CHUNK = 200"), ("RANGE = 96", "RANGE = 7"), ("BLOCK = 32", "BLOCK = 12")
    compile_anew(*shared, flags=tuple(instructions if f.startswith("-march") else f for f in compiling.FLAGS))
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            for kind in KINDS:
                keys = make_keys(kind, (230, 80), DTYPES["f16"], seed=7)
                assert_agrees(keys, keep_ratio=0.2, chunk_size=32)
                assert_agrees(keys, keep_ratio=0.3, chunk_size=220)  # all threads share one chunk
        finally:
            torch.set_num_threads(int(os.environ["KVCLUSTER_TEST_THREADS"]))
