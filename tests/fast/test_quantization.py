"""Codes, scales and zeros: the same bits in NumPy, torch and C++, and what is read back is exact."""

import numpy as np
import pytest
import torch
from agreement import assert_same_bits
from hypothesis import given
from hypothesis import strategies as st
from inputs import DTYPES, KINDS, make_keys, to_numpy, to_torch

from kvcluster import fast, reference
from kvcluster.fast.backends import cell
from kvcluster.fast.exact.blocks import BlockLayout, unpack
from kvcluster.reference import quantization

BITS = (8, 4, 3, 2)
LAYOUTS = [(bits, bits) for bits in BITS] + [(4, 2), (3, 8)]


def assert_same(ours, theirs):
    assert_same_bits(ours.codes, theirs.codes)
    assert_same_bits(ours.scales.float(), theirs.scales)
    assert_same_bits(ours.zeros, theirs.zeros)


def spread_out(shape, seed):
    """Groups of very different sizes and places, with ties between two codes, constants and zeros among them."""
    rng = np.random.default_rng(seed)
    array = rng.standard_normal(shape) * np.exp(3 * rng.standard_normal((*shape[:-1], 1)))
    array += 10 * rng.standard_normal((*shape[:-1], 1)) * (rng.random((*shape[:-1], 1)) < 0.5)
    rows = array.reshape(-1, shape[-1])
    rows[0::7] = rng.integers(0, 31, rows[0::7].shape) / 2
    rows[0::7, 0], rows[0::7, -1] = 0, 15  # in 4 bits steps of 1
    rows[1::7] = rows[1::7, :1]
    rows[2::7] = 0
    return np.clip(array, -6e4, 6e4).astype(np.float32)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("n_numbers", [1, 5, 31, 32, 33, 64, 100])
def test_codes_have_the_same_bits_in_torch(bits, n_numbers):
    array = spread_out((3, 14, n_numbers), n_numbers)
    theirs = reference.quantize(array, bits=bits)
    ours = fast.quantize(to_torch(array), bits=bits)
    assert_same(ours, theirs)
    assert_same_bits(fast.dequantize(ours, n_numbers), reference.dequantize(theirs, n_numbers))
    nbytes = 3 * 14 * -(-n_numbers // 32) * 4 * (bits + 1)
    assert (ours.bits, ours.nbytes) == (theirs.bits, theirs.nbytes) == (bits, nbytes)


@given(
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(list(DTYPES)),
    bits=st.sampled_from(BITS),
    n_numbers=st.integers(1, 70),
    seed=st.integers(0, 1000),
)
def test_codes_of_any_numbers_have_the_same_bits(kind, dtype, bits, n_numbers, seed):
    array = make_keys(kind, (2, 3, n_numbers), DTYPES[dtype], seed)
    assert_same(fast.quantize(to_torch(array), bits=bits), reference.quantize(array, bits=bits))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [16, 48, 64])
def test_blocks_in_cpp_are_those_of_torch(layout, dtype, dim):
    keys, values = (to_torch(spread_out((2, 3, 96, dim), seed).astype(DTYPES[dtype])) for seed in (1, 2))
    counts = torch.randint(1, 300, (2, 3, 96), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    layout = BlockLayout(dim, dim, layout)
    ours, plain = (cell("pack_blocks", backend)(keys, values, counts, layout) for backend in ("cpp", "torch"))
    assert torch.equal(ours, plain)
    assert not torch.equal(cell("pack_blocks", "cpp")(keys.flip(-2), values, counts, layout), plain)  # the wrong twin
    of_heads = [x.transpose(0, 1) for x in (keys, values, counts)]  # not contiguous
    assert torch.equal(cell("pack_blocks", "cpp")(*of_heads, layout), plain.transpose(0, 1))


def test_blocks_hold_what_the_reference_reads_back():
    keys, values = spread_out((2, 64, 40), 3), spread_out((2, 64, 24), 4)
    counts = torch.arange(1, 65, dtype=torch.int32).expand(2, -1)
    layout = BlockLayout(40, 24, (4, 3))
    blocks = cell("pack_blocks", "torch")(to_torch(keys), to_torch(values), counts, layout)
    expected_keys, expected_values, nbytes = quantization.read_back(keys, values, (4, 3))
    read_keys, read_values, read_counts = unpack(blocks, layout)
    assert_same_bits(read_keys, expected_keys)
    assert_same_bits(read_values, expected_values)
    assert torch.equal(read_counts, counts)
    assert blocks.nbytes == nbytes + 2 * counts.numel()


@pytest.mark.parametrize("bits", BITS)
def test_what_is_read_back_is_exact_and_near(bits):
    array = spread_out((50, 6, 64), bits)
    quantized = reference.quantize(array, bits=bits)
    read = reference.dequantize(quantized, 64)
    scales, zeros = (np.repeat(x, 32, axis=-1).astype(np.float64) for x in (quantized.scales, quantized.zeros))
    codes = quantization.unpack(quantized.codes, bits).reshape(array.shape)
    assert np.array_equal(read, scales * (codes - zeros / 16))  # in float64, where nothing is rounded
    assert (np.abs(read - array.astype(np.float64)) <= scales / 2).all()


def test_quantizing_by_hand():
    quantized = fast.quantize(torch.tensor([[-1.0, 0.0, 0.5, 1.5, 2.5, 14.0]]), bits=4)
    assert quantized.scales.tolist() == [[1.0]]
    assert quantized.zeros.tolist() == [[16]]
    codes = quantization.unpack(quantized.codes.numpy(), 4)[0, 0, :6]
    assert codes.tolist() == [0, 1, 2, 2, 4, 15]  # 1.5 and 2.5 steps go to the even numbers
    assert quantized.codes[0, 0, :6].tolist() == [0, 1, 2, 2, 4, 15]
    from_a_half = fast.quantize(torch.tensor([[0.5, 15.5, 3.0]]), bits=4)
    assert from_a_half.zeros.tolist() == [[-8]]
    assert fast.dequantize(from_a_half, 3).tolist() == [[0.5, 15.5, 2.5]]


def test_three_bits_are_a_plane_of_two_and_one_of_one():
    codes = np.arange(32, dtype=np.uint8) % 8
    packed = quantization.pack(codes, 3)
    assert len(packed) == 12
    low, high = packed[:8], packed[8:]
    for lane, code in enumerate(codes):
        assert (low[lane % 8] >> 2 * (lane // 8) & 3) == code % 4
        assert (high[lane % 4] >> lane // 4 & 1) == code // 4


def half_up(array):
    return np.floor(array + 0.5)


@pytest.mark.parametrize("wrong", ["half up", "nearest scale", "other places"])
def test_wrong_twins_of_quantizing_are_told_apart(wrong, monkeypatch):
    array = spread_out((3, 14, 64), 5)
    ours = fast.quantize(to_torch(array), bits=4)
    if wrong == "half up":
        monkeypatch.setattr(np, "rint", half_up)
    elif wrong == "nearest scale":
        to_nearest = lambda x: to_numpy(torch.from_numpy(x).bfloat16().float())  # noqa: E731
        monkeypatch.setattr(quantization, "up_to_bfloat16", to_nearest)
    else:
        right = quantization.pack
        monkeypatch.setattr(quantization, "pack", lambda codes, bits: right(codes[..., ::-1], bits))
    with pytest.raises(AssertionError):
        assert_same(ours, reference.quantize(array, bits=4))


@pytest.mark.parametrize("package", [reference, fast])
@pytest.mark.parametrize(
    ("change", "bits", "error", "message"),
    [
        (lambda x: x, 5, ValueError, "bits must be 8, 4, 3 or 2, got 5"),
        (lambda x: x, 4.0, TypeError, "bits must be an integer, got 4.0"),
        (lambda x: x, True, TypeError, "bits must be an integer, got True"),
        (lambda x: x * np.float32(np.nan), 4, ValueError, "array must be finite"),
        (lambda x: x + np.float32(2e38), 4, ValueError, r"array must be at most 1.7e\+38 in size to be quantized, got"),
        (lambda x: x.astype(np.float64), 4, ValueError, "array must be float16, bfloat16 or float32, got float64"),
        (lambda x: x[0], 4, ValueError, "array must have shape"),
        (lambda x: x[:, :0], 4, ValueError, "array must have dim >= 1"),
    ],
)
def test_what_cannot_be_quantized_is_refused(package, change, bits, error, message):
    array = change(np.ones((2, 8), dtype=np.float32))
    with pytest.raises(error, match=message):
        package.quantize(array if package is reference else torch.from_numpy(array), bits=bits)
