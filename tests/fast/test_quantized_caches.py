"""Caches with few bits: bit for bit the reference's, croppable, and attended to where the codes lie."""

import itertools

import numpy as np
import pytest
import torch
from agreement import assert_same_bits, attention_agrees
from hypothesis import given
from hypothesis import strategies as st
from inputs import DTYPES, make_keys, to_torch

from kvcluster import fast, reference
from kvcluster.fast.backends import cell
from kvcluster.fast.entry_cache import UNDO_TOKENS
from kvcluster.fast.exact.blocks import BlockLayout
from kvcluster.fast.memory.packed import PackedBlocks

SMALL = {"chunk_size": 20, "n_sink": 3, "n_recent": 7}
RECENT_TOO = {"chunk_size": 32, "n_sink": 3, "n_recent": 70, "n_exact": 9}
RATIOS = (0.3, 1.0, 0.05, 0.55)
KINDS = {
    "ClusteredCache": {"keep_ratio": 0.4, **SMALL},
    "all tokens": {"keep_ratio": 1.0, **SMALL},
    "RaggedCache": {"keep_ratios": RATIOS, **SMALL},
    "recent tokens too": {"keep_ratio": 0.4, **RECENT_TOO},
    "Ragged, recent too": {"keep_ratios": RATIOS, **RECENT_TOO, "chunk_size": 64},
}
WITH_EXACT_WINDOW = [kind for kind, rules in KINDS.items() if "n_exact" not in rules]
BITS = [8, 4, (4, 2), 3]


def make(package, kind, method="SoftMatching", **plan):
    rules = KINDS[kind] | {"bits": 4} | plan
    if rules["bits"] == 16:
        rules.pop("n_exact", None)
    name = "RaggedCache" if "keep_ratios" in rules else "ClusteredCache"
    return getattr(package, name)(method=getattr(package, method)(), **rules)


def tokens_of(n_tokens, *, lead=(2, 4), dtype="f32", dims=(16, 16), seed=0):
    return [make_keys("smooth", (*lead, n_tokens, dim), DTYPES[dtype], seed + i) for i, dim in enumerate(dims)]


def fed(cache, pieces, tokens):
    """The cache after these appends, and what the last of them returned."""
    returned = None
    convert = np.ascontiguousarray if type(cache).__module__.startswith("kvcluster.reference") else to_torch
    for start, stop in itertools.pairwise(itertools.accumulate((0, *pieces))):
        returned = cache.append(*(convert(x[..., start:stop, :]) for x in tokens))
    return cache, returned


def assert_same_entries(ours, theirs):
    for array, expected in zip(ours, theirs, strict=True):
        assert_same_bits(array, np.ascontiguousarray(expected))


@given(
    kind=st.sampled_from(list(KINDS)),
    method=st.sampled_from(["SoftMatching", "Distinctive"]),
    pieces=st.lists(st.integers(0, 150), min_size=1, max_size=4),
    bits=st.sampled_from(BITS),
    dtype=st.sampled_from(list(DTYPES)),
    recent_share=st.sampled_from([0.0, 0.3]),
)
def test_any_split_gives_the_same_bytes_in_numpy_and_torch(kind, method, pieces, bits, dtype, recent_share):
    tokens = tokens_of(sum(pieces), lead=(1, 4), dtype=dtype, dims=(8, 6))
    plan = {"bits": bits, "recent_share": recent_share}
    theirs, returned = fed(make(reference, kind, method, **plan), pieces, tokens)
    ours, ours_returned = fed(make(fast, kind, method, **plan), pieces, tokens)
    at_once, _ = fed(make(reference, kind, method, **plan), [sum(pieces)], tokens)
    assert_same_entries(ours.entries() or (), theirs.entries() or ())
    assert_same_entries(ours_returned, returned)
    for array, expected in zip(at_once.entries() or (), theirs.entries() or (), strict=True):
        assert array.tobytes() == expected.tobytes()
    assert (ours.nbytes, ours.n_seen) == (theirs.nbytes, theirs.n_seen)


@pytest.mark.parametrize("kind", WITH_EXACT_WINDOW)
def test_entries_are_those_of_the_exact_cache_quantized_in_groups_of_32(kind):
    tokens = tokens_of(400)
    cache, _ = fed(make(fast, kind), [400], tokens)
    exact, _ = fed(make(fast, kind, bits=16), [400], tokens)
    entries, expected = cache.entries(), exact.entries()
    assert torch.equal(entries[2], expected[2])
    lengths = cache.lengths if kind == "RaggedCache" else [cache.n_stored] * 4
    for head, length in enumerate(lengths):
        n_body = length - 3 - (400 - 3 - cache.n_clustered)
        n_quantized = n_body // 32 * 32
        keys, values, _ = (x[:, head, -length:] for x in expected)
        body, ours = slice(3, 3 + n_quantized), [x[:, head, -length:] for x in entries]
        for x, y in ((ours[0], keys), (ours[1], values)):
            assert torch.equal(x[:, :3], y[:, :3])
            assert torch.equal(x[:, body.stop :], y[:, body.stop :])
        if n_quantized:
            of_keys = fast.quantize(keys[:, body].mT, bits=4)
            assert torch.equal(ours[0][:, body], fast.dequantize(of_keys, n_quantized).mT)
            assert torch.equal(ours[1][:, body], fast.dequantize(fast.quantize(values[:, body], bits=4), 16))


@pytest.mark.parametrize("n_tokens", [50, 140, 300, 333])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in WITH_EXACT_WINDOW])
def test_recent_tokens_are_clustered_as_they_are_read_back(kind, dtype, n_tokens):
    """The oracle is the cache with an exact window, given tokens that were quantized and read back before."""
    tokens = tokens_of(n_tokens, dtype=dtype)
    cache, _ = fed(make(fast, kind), [n_tokens], tokens)
    n_old = (n_tokens - 3 - 9) // 32 * 32
    old = [to_torch(x[..., 3 : 3 + n_old, :]) for x in tokens]
    of_keys, of_values = fast.quantize(old[0].mT, bits=4), fast.quantize(old[1], bits=4)
    read = [fast.dequantize(of_keys, n_old).mT, fast.dequantize(of_values, 16)]
    known = [to_torch(x).clone() for x in tokens]
    for array, numbers in zip(known, read, strict=True):
        array[..., 3 : 3 + n_old, :] = numbers.to(array.dtype)
    expected = make(fast, kind, n_exact=None)
    expected.append(*known)
    of_exact, _ = fed(make(fast, kind, n_exact=None), [n_tokens], tokens)  # the wrong twin: as they came
    assert torch.equal(of_exact.entries()[0], expected.entries()[0]) == (n_old == 0)
    n_recent = n_tokens - 3 - cache.n_clustered
    n_read = n_old - cache.n_clustered  # recent tokens that are quantized
    assert expected.n_clustered == cache.n_clustered
    for head, length in enumerate(getattr(cache, "lengths", None) or [cache.n_stored] * 4):
        n_body = length - 3 - n_recent
        begin, end = 3 + n_body // 32 * 32, 3 + n_body  # of what is left of the body
        ours, others = ([x[:, head, -length:] for x in each.entries()] for each in (cache, expected))
        of_tokens = *(x[:, head, cache.n_clustered :] for x in read), torch.ones(2, n_read)
        for array, other, quantized in zip(ours, others, of_tokens, strict=True):
            right = other[:, :begin], quantized, other[:, begin:end], other[:, end + n_read :]
            assert torch.equal(array.float(), torch.cat([x.float() for x in right], dim=1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_is_to_what_is_read_back(kind, dtype):
    tokens = tokens_of(300, dtype=dtype)
    cache, _ = fed(make(fast, kind), [300], tokens)
    assert cache.is_quantized
    query = to_torch(make_keys("normal", (2, 4, 3, 16), DTYPES[dtype], 9))
    output = cache.attend(query)
    assert attention_agrees(output, query, *cache.entries())
    exact, _ = fed(make(fast, kind, bits=2), [300], tokens)
    assert not attention_agrees(output, query, *exact.entries())  # the wrong twin: other bits


@pytest.mark.parametrize("dim", [16, 48, 64, 256])
@pytest.mark.parametrize("bits", [(8, 8), (4, 4), (3, 3), (2, 2), (4, 2), (2, 8)])
@pytest.mark.parametrize("rows", [1, 3, 6])
@pytest.mark.parametrize("backend", ["cpp", "torch"])
def test_every_backend_attends_to_blocks_and_other_entries(backend, dim, bits, rows):
    generator = torch.Generator().manual_seed(dim + rows)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    held = PackedBlocks(BlockLayout(dim, dim, bits), (2, 2), torch.device("cpu"))
    mean = 3 * normal(dim)
    for head, n in enumerate((96, 0)):
        counts = torch.randint(1, 300, (2, n), generator=generator, dtype=torch.int32)
        if n:
            held.add(head, normal(2, n, dim) + mean, normal(2, n, dim), counts)
    keys, values = normal(2, 60, dim) + mean, normal(2, 60, dim)
    counts = torch.randint(1, 5, (2, 60), generator=generator, dtype=torch.int32)
    query, lengths, firsts = normal(2, 2, rows, dim), (40, 5), (0, 50)
    queries = 3 if rows % 3 == 0 else 1
    arrays = (query, keys, values, counts, lengths, firsts, held.packed(), queries, dim**-0.5)
    output = cell("attend_packed", backend)(*arrays)
    for head, (n, first) in enumerate(zip(lengths, firsts, strict=True)):
        read = held.of_head(head)
        exact = [x[:, first : first + n] for x in (keys, values, counts)]
        entries = [torch.cat(pair, dim=1) for pair in zip(read, exact, strict=True)]
        for row in range(rows):
            seen = entries[0].shape[1] - queries + row % queries + 1
            of_row = output[:, head, row : row + 1], query[:, head, row : row + 1]
            assert attention_agrees(*of_row, *(x[:, :seen] for x in entries))
            if n < 40:
                wrong = [x[:, : seen - 1] for x in entries]  # the wrong twin: without the newest entry
                assert not attention_agrees(*of_row, *wrong)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pieces", [[300], [280, 20], [200, 100], [61, *[1] * 60]])
def test_crop_gives_the_cache_that_never_saw_the_tokens(kind, pieces):
    n_tokens, tokens = sum(pieces), tokens_of(sum(pieces))
    for n_removed in {0, 1, 13, 40}:
        cache, _ = fed(make(fast, kind), pieces, tokens)
        if n_removed > cache.n_croppable:
            with pytest.raises(ValueError, match="n_tokens must be at most"):
                cache.crop(n_removed)
            continue
        cache.crop(n_removed)
        fresh, _ = fed(make(fast, kind), [n_tokens - n_removed], tokens)
        for array, expected in zip(cache.entries(), fresh.entries(), strict=True):
            assert torch.equal(array, expected)
        assert cache.nbytes == fresh.nbytes
        rest = [x[..., n_tokens - n_removed :, :] for x in tokens]
        fed(cache, [n_removed], rest)
        whole, _ = fed(make(fast, kind), [n_tokens], tokens)
        for array, expected in zip(cache.entries(), whole.entries(), strict=True):
            assert torch.equal(array, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_last_short_append_can_be_undone(kind):
    tokens = tokens_of(500)
    cache, _ = fed(make(fast, kind), [100, 400], tokens)
    assert cache.n_croppable < 30
    cache, _ = fed(make(fast, kind), [500 - UNDO_TOKENS, UNDO_TOKENS], tokens)
    assert cache.n_croppable >= UNDO_TOKENS
    reserved = cache.nbytes_reserved
    fed(cache, [1], tokens_of(1))
    assert cache.nbytes_reserved < reserved


@pytest.mark.parametrize("kind", KINDS)
def test_state_and_rows_carry_the_blocks(kind):
    tokens = tokens_of(300)
    cache, _ = fed(make(fast, kind), [290, 10], tokens)
    restored = make(fast, kind)
    restored.restore(*cache.state())
    for array, expected in zip(restored.entries(), cache.entries(), strict=True):
        assert torch.equal(array, expected)
    before = cache.entries()
    cache.select(torch.tensor([1, 0, 1]))
    for array, expected in zip(cache.entries(), before, strict=True):
        assert torch.equal(array, expected[[1, 0, 1]])
    for each in (cache, restored):
        fed(each, [100], tokens_of(100, lead=(each.n_rows, 4)))
    assert cache.n_stored == restored.n_stored


@pytest.mark.parametrize("kind", KINDS)
def test_memory_is_freed(kind):
    tokens = tokens_of(4000, dims=(64, 64))
    cache, _ = fed(make(fast, kind), [4000], tokens)
    exact, _ = fed(make(fast, kind, bits=16), [4000], tokens)
    n_quantized = sum(cache._packed.n_entries) / 4
    # 4 bits, 1 for scale and zero, in place of 32; the rest as it was
    expected = exact.nbytes - n_quantized * 8 * (2 * 64 * (32 - 5) / 8 + 2)
    assert cache.nbytes == expected
    assert cache.nbytes_reserved < 1.25 * cache.nbytes


@pytest.mark.parametrize("package", [reference, fast])
@pytest.mark.parametrize(
    ("plan", "error", "message"),
    [
        ({"bits": 5}, ValueError, "bits must be 16, or 8, 4, 3 or 2 for both or for keys and values, got 5"),
        ({"bits": (4, 16)}, ValueError, r"bits must be 16, or 8, 4, 3 or 2 .* got \(4, 16\)"),
        ({"bits": "4"}, TypeError, "bits must be an integer, or one for keys and one for values, got '4'"),
        ({"bits": (4, 4, 4)}, TypeError, "bits must be an integer, or one for keys and one for values"),
        ({"bits": True}, TypeError, "bits must be an integer"),
        (
            {"bits": 4, "chunk_size": 40000},
            ValueError,
            "chunk_size must be at most 32767 with bits below 16, got 4",
        ),
        ({"bits": 4, "whole_heads": (1,)}, ValueError, r"whole_heads must be empty with bits below 16, got \[1\]"),
        ({"n_exact": 0}, ValueError, "n_exact must be None with 16 bits, where all is exact, got 0"),
        ({"bits": 4, "n_exact": 8}, ValueError, "n_exact must be at most n_recent, got 8 > 7"),
        ({"bits": 4, "n_exact": 7}, ValueError, "chunk_size must be a multiple of 32 with n_exact, got 20"),
        ({"bits": 4, "n_exact": -1}, ValueError, "n_exact must be at least 0, got -1"),
        ({"bits": 4, "n_exact": 2.0}, TypeError, "n_exact must be an integer, got 2.0"),
        ({"bits": 4, "n_exact": True}, TypeError, "n_exact must be an integer, got True"),
    ],
)
def test_bits_that_cannot_be_served_are_refused(package, plan, error, message):
    with pytest.raises(error, match=message):
        package.ClusteredCache(**{"keep_ratio": 0.5, **SMALL, **plan})


@pytest.mark.parametrize("package", [reference, fast])
@pytest.mark.parametrize("kind", KINDS)
def test_numbers_that_cannot_be_quantized_lose_nothing(package, kind):
    tokens = tokens_of(100)
    cache, _ = fed(make(package, kind), [100], tokens)
    before = [np.asarray(x).copy() for x in cache.entries()]
    large = [np.full((2, 4, 5, 16), 2e38, dtype=np.float32), np.ones((2, 4, 5, 16), dtype=np.float32)]
    for name, arrays in (("keys", large), ("values", large[::-1])):
        with pytest.raises(ValueError, match=rf"{name} must be at most 1.7e\+38 in size to be quantized, got 2e\+38"):
            fed(cache, [5], arrays)
    assert cache.n_seen == 100
    for array, expected in zip(cache.entries(), before, strict=True):
        assert np.array_equal(array, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("keys", "error", "message"),
    [
        (np.ones((2, 4, 5, 16), dtype=np.float32), TypeError, "keys must be a torch tensor, got ndarray"),
        (torch.ones(2, 4, 5, 16, dtype=torch.bool), ValueError, "keys must be float16, bfloat16 or float32, got bool"),
        (torch.full((2, 4, 5, 16), torch.inf), ValueError, "keys must be finite"),
        (torch.full((2, 4, 5, 16), 1e300, dtype=torch.float64), ValueError, "keys must be float16, .* got float64"),
    ],
)
def test_what_is_no_key_is_refused_as_without_bits(kind, keys, error, message):
    for bits in (16, 4):
        with pytest.raises(error, match=message):
            make(fast, kind, bits=bits).append(keys, torch.ones(2, 4, 5, 16))


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_no_rows_has_entries_as_any_other(kind):
    (ours, _), (theirs, _) = (
        fed(make(package, kind), [150, 60], tokens_of(210, lead=(0, 4))) for package in (fast, reference)
    )
    assert ours.is_quantized
    assert_same_entries(ours.entries(), theirs.entries())
    assert ours.attend(torch.empty(0, 4, 3, 16)).shape == (0, 4, 3, 16)


@pytest.mark.parametrize("kind", [kind for kind, rules in KINDS.items() if "keep_ratios" not in rules])
@pytest.mark.parametrize("lead", [(0,), (2, 0), (0, 0)])
def test_a_cache_without_kv_heads_counts_entries_as_any_other(kind, lead):
    tokens, query = tokens_of(200, lead=lead), torch.ones(*lead, 2, 16)
    (ours, _), (theirs, _) = fed(make(fast, kind), (150, 50), tokens), fed(make(reference, kind), (150, 47), tokens)
    ours.crop(3)
    restored = make(fast, kind)
    restored.restore(*ours.state())
    for cache in (ours, restored):
        assert (cache.n_stored, cache.n_quantized, cache.nbytes) == (theirs.n_stored, theirs.n_quantized, 0)
        assert_same_entries(cache.entries(), theirs.entries())
        assert cache.attend(query).shape == theirs.attend(query.numpy()).shape
