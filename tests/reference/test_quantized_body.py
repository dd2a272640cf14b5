"""Scales, zeros and codes by hand; what a cache with few bits shows of its entries. In NumPy and in torch alike."""

import numpy as np
import pytest
from inputs import DTYPES, make_keys, to_numpy, to_torch

from kvcluster import fast, reference
from kvcluster.reference.quantization import unpack

BOTH = ((reference, np.copy, np.asarray), (fast, to_torch, to_numpy))
PLAN = {"keep_ratio": 0.5, "chunk_size": 16, "n_sink": 3, "n_recent": 20}  # 8 entries of a chunk
in_both = pytest.mark.parametrize(("package", "convert", "back"), BOTH, ids=["reference", "fast"])


def quantized(package, convert, rows, bits):
    return package.quantize(convert(np.array(rows, dtype=np.float32)), bits=bits)


@in_both
def test_scales_and_zeros_by_hand(package, convert, back):
    """A third of 3 and hardly more is rounded to float32, then up. No zero is beyond 2047 steps; of zeros all is 0."""
    rows = [[3, -3 * 2.0**-27], [5.625, -0.9 * 2.0**-22], [5, 0], [2047] * 2, [-2047] * 2, [0, -0.0], [2.0**-149] * 2]
    made = quantized(package, convert, rows, 2)
    scales = made.scales if package is reference else made.scales.float()
    assert back(scales).flatten().tolist() == [1, 1.875 + 2.0**-7, 1.6640625 + 2.0**-7, 1, 1, 0, 0]
    assert back(made.zeros).flatten().tolist() == [0, 0, 0, -32752, 32752, 0, 0]
    assert not np.signbit(back(scales)).any()
    read = back(package.dequantize(made, 2))
    assert read[3:].tolist() == [[2047] * 2, [-2047] * 2, [0, 0], [0, 0]]


@in_both
def test_groups_are_of_32_numbers_and_the_last_is_shorter(package, convert, back):
    """Of 33 numbers the last is alone, and its step is the smallest whose zero fits 16 bits."""
    row = [*range(31), 15.0, 1024.0]
    made = quantized(package, convert, [row], 4)
    assert back(made.codes).shape == (1, 2, 16)
    scales = back(made.scales if package is reference else made.scales.float())[0]
    assert scales.tolist() == [2, 0.5 * (1 + 2.0**-7)]
    codes = unpack(back(made.codes), 4)[0]
    assert codes[0, :7].tolist() == [0, 0, 1, 2, 2, 2, 3]  # halves to the even number
    assert codes[1].tolist() == [0] * 32
    assert abs(back(package.dequantize(made, 33))[0, 32] - 1024) <= scales[1] / 2


@in_both
def test_the_largest_number_has_the_largest_code(package, convert, back):
    """Also where the scale was rounded down to 1, and where the zero is half of a sixteenth too large."""
    made = quantized(package, convert, [[-127.5, 127.5 + 2.0**-17], [-127.5 - 3 / 32, 127.5 - 3 / 32]], 8)
    assert back(made.codes)[:, 0, :2].tolist() == [[0, 255]] * 2
    assert back(made.zeros).tolist() == [[2040], [2042]]
    assert back(package.dequantize(made, 2)).tolist() == [[-127.5, 127.5], [-127.625, 127.375]]


def filled(package, convert, tokens, pieces=(150,), **plan):
    cache, start = package.ClusteredCache(**PLAN | {"bits": 4} | plan), 0
    for piece in pieces:
        cache.append(*(convert(x[..., start : start + piece, :]) for x in tokens))
        start += piece
    return cache


@pytest.mark.parametrize("dtype", DTYPES)
@in_both
def test_a_cache_shows_what_is_quantized_and_what_is_not(package, convert, back, dtype):
    """Of 7 chunks' 56 entries, 32 are quantized; sinks, 24 of the body and 35 recent tokens are not."""
    tokens = [make_keys("smooth", (2, 150, dim), DTYPES[dtype], dim) for dim in (16, 6)]
    cache, exact = (filled(package, convert, tokens, bits=bits) for bits in ((4, 3), 16))
    assert exact.quantized is None
    shown = [back(x) for x in (cache.keys, cache.values, cache.counts)]
    read = [back(x) for x in cache.quantized]
    entries, others = ([back(x) for x in each.entries()] for each in (cache, exact))
    assert [x.dtype for x in (*shown, *read)] == [DTYPES[dtype]] * 2 + [np.int32] + [np.float32] * 2 + [np.int32]
    for part, axis in enumerate((-2, -2, -1)):
        sinks, rest = np.split(shown[part], [3], axis=axis)
        assert entries[part].tolist() == np.concatenate([sinks, read[part], rest], axis=axis).tolist()
        right = np.delete(others[part], np.s_[3:35], axis=axis)
        assert (shown[part].dtype, shown[part].tobytes()) == (right.dtype, right.tobytes())
    assert read[2].tolist() == others[2][:, 3:35].tolist()
    assert (cache.n_stored, cache.n_seen, read[0].shape) == (3 + 56 + 35, 150, (2, 32, 16))
    of_block = 16 * 4 * (4 + 1) + 32 * 4 * (3 + 1) + 32 * 2
    assert cache.nbytes == sum(x.nbytes for x in shown) + 2 * of_block


@in_both
def test_keys_share_scales_by_channel_and_values_by_entry(package, convert, back):
    tokens = [make_keys("normal", (150, dim), DTYPES["f16"], dim) for dim in (5, 40)]
    cache, exact = (filled(package, convert, tokens, bits=bits) for bits in ((3, 2), 16))
    keys, values, _ = (back(x) for x in cache.quantized)
    body = [np.ascontiguousarray(back(x)[3:35]) for x in exact.entries()[:2]]
    of_keys = reference.dequantize(reference.quantize(np.ascontiguousarray(body[0].T), bits=3), 32)
    assert keys.tolist() == of_keys.T.tolist()
    assert values.tolist() == reference.dequantize(reference.quantize(body[1], bits=2), 40).tolist()


@in_both
def test_blocks_are_quantized_once_and_for_good(package, convert, back):
    tokens = [make_keys("normal", (2, 150, 16), DTYPES["f32"], seed) for seed in (1, 2)]
    whole = filled(package, convert, tokens)
    for pieces in ((0, 86, 0, 1, 63), (1,) * 150, (86,), (87,)):
        cache = filled(package, convert, tokens, pieces)
        assert (cache.quantized is None) == (pieces == (86,))  # 3 chunks, 24 entries
        if cache.quantized is not None:
            held = [back(x).tobytes() for x in cache.quantized]
            assert held == [back(x).tobytes() for x in whole.quantized]


@pytest.mark.parametrize("dtype", DTYPES)
@in_both
def test_heads_whose_entries_are_not_quantized_are_float32_beside_others(package, convert, back, dtype):
    """Chunks of 16 become 1 and 16 entries: only the second head has a block of 32."""
    tokens = [make_keys("normal", (2, 2, 90, 8), DTYPES[dtype], seed) for seed in (1, 2)]
    rules = PLAN | {"keep_ratios": (0.05, 1.0), "bits": 8}
    del rules["keep_ratio"]
    cache, exact = package.RaggedCache(**rules), package.RaggedCache(**rules | {"bits": 16})
    for each in (cache, exact):
        each.append(*map(convert, tokens))
    keys, others = back(cache.entries()[0]), back(exact.entries()[0])
    assert (keys.dtype, others.dtype) == (np.float32, DTYPES[dtype])
    assert keys[:, 0].tolist() == others[:, 0].astype(np.float32).tolist()
    assert (keys[:, 1] != others[:, 1].astype(np.float32)).any(axis=(0, 2)).nonzero()[0].tolist() == [*range(3, 67)]
    assert cache.lengths == exact.lengths == (3 + 4 + 23, 90)
