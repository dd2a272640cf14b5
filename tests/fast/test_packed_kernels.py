"""Attention to codes in Triton: within the bound of the reference on what is read back, and wrong twins out of it."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from agreement import attention_agrees
from inputs import DTYPES, slowly, to_torch

from kvcluster.fast.backends import cell, implementation
from kvcluster.fast.exact.blocks import BlockLayout, Packed, pack
from kvcluster.fast.kernels import attention as attention_module
from kvcluster.fast.kernels import packed as packed_module

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def short_splits(few_programs, monkeypatch):
    """Heads have few exact entries here: one step of the interpreter for each split of them."""
    if DEVICE == "cpu":
        monkeypatch.setattr(attention_module, "SPLIT", 128)


def problem(
    seed, *, dims=(64, 64), bits=(4, 4), blocks=(3, 0), lengths=(40, 5), rows=4, queries=1, dtype="f32", spread=1.0
):
    """All arguments of `attend_packed`: heads with `blocks` blocks and `lengths` entries, with gaps between them."""
    rng = np.random.default_rng(seed)
    heads, batch = len(blocks), 2

    def one_behind_the_other(numbers, gap):
        firsts = tuple(itertools.accumulate((gap, *(n + gap for n in numbers))))
        return firsts[:-1], firsts[-1]

    (first_blocks, n_blocks), (firsts, places) = one_behind_the_other(blocks, 1), one_behind_the_other(lengths, 2)
    means = 3 * rng.standard_normal(dims[0]), rng.standard_normal(dims[1])  # zeros far from the middle of the codes
    old = [mean + rng.standard_normal((batch, 32 * n_blocks, len(mean))) for mean in means]
    new = [mean + rng.standard_normal((batch, places, len(mean))) for mean in means]
    counts = [rng.integers(1, 300, array[0].shape[:2]).astype(np.int32) for array in (old, new)]
    for first, n in zip(firsts, lengths, strict=True):
        counts[1][:, first + n - queries : first + n] = 1
    query = spread * rng.standard_normal((batch, heads, rows, dims[0]))
    query, *new = (to_torch(array.astype(DTYPES[dtype])).to(DEVICE) for array in (query, *new))
    *old, old_counts, counts = (
        to_torch(array).to(DEVICE) for array in (*(x.astype(DTYPES[dtype]) for x in old), *counts)
    )
    layout = BlockLayout(*dims, bits)
    packed = Packed(layout, pack(*old, old_counts, layout), blocks, first_blocks)
    return query, *new, counts, lengths, firsts, packed, queries, dims[0] ** -0.5


def attended(arguments, **changes):
    """By the kernels, of what `changes` make of the blocks, or of which of them a head has."""
    *others, packed, queries, scale = arguments
    attend = implementation("attend_packed", "triton", *others[:3])
    return attend(*others, dataclasses.replace(packed, **changes), queries, scale)


def agrees(output, arguments):
    """Every row against the oracle on the entries that it may see."""
    query, keys, values, counts, lengths, firsts, packed, queries, _ = arguments
    for head, (n, first) in enumerate(zip(lengths, firsts, strict=True)):
        others = (x[:, first : first + n].float() for x in (keys, values, counts))
        entries = [torch.cat(pair, dim=1) for pair in zip(packed.of_head(head), others, strict=True)]
        entries[2] = entries[2].int()
        for token in range(queries):
            seen = entries[0].shape[1] - queries + token + 1
            of_rows = (x[:, head, token::queries].cpu() for x in (output, query))
            if not attention_agrees(*of_rows, *(x[:, :seen].cpu() for x in entries)):
                return False
    return True


def changed(packed, name, change):
    """The blocks, and in them what `change` makes of one of their parts."""
    parts = zip(packed.blocks.split(packed.layout.sizes, dim=-1), packed.layout.shapes.items(), strict=True)
    made = []
    for part, (of_name, (dtype, shape)) in parts:
        whole = part.contiguous().view(dtype).unflatten(-1, shape)
        whole = change(whole) if of_name == name else whole
        made.append(whole.flatten(-len(shape)).contiguous().view(torch.uint8))
    return torch.cat(made, dim=-1)


def bytes_late(codes):
    return codes.roll(1, -1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "sizes",
    [
        {"dims": (64, 64), "rows": 3},
        {"dims": (80, 24), "bits": (3, 2), "rows": 9, "queries": 3},
        {"dims": (5, 40), "bits": (8, 3), "blocks": (1, 9), "lengths": (2, 300), "rows": 2, "queries": 2},
        {"dims": (128, 128), "bits": (4, 2), "blocks": (0, 2, 17), "lengths": (1, 1, 1), "rows": 1},
        slowly({"dims": (256, 256), "bits": (2, 8), "rows": 8}),
        slowly({"dims": (100, 1), "bits": (3, 3), "rows": 34, "queries": 2}),
        slowly({"dims": (16, 16), "bits": (8, 8), "blocks": (40,), "lengths": (600,), "rows": 20, "queries": 5}),
    ],
    ids=lambda sizes: " ".join(map(str, sizes["dims"])),
)
def test_attention_to_blocks_and_entries_is_within_the_bound(sizes, dtype, short_splits):
    arguments = problem(1, dtype=dtype, **sizes)
    packed = arguments[6]
    output = attended(arguments)
    assert output.dtype == arguments[0].dtype
    assert agrees(output, arguments)
    for part in ("key_codes", "value_codes"):  # the wrong twins: bytes in another order
        if sizes["dims"][part == "value_codes"] > 1:
            assert not agrees(attended(arguments, blocks=changed(packed, part, bytes_late)), arguments), part


@pytest.mark.parametrize("bits", [(8, 8), (4, 4), (3, 3), (2, 2)], ids=lambda bits: bits[0])
def test_wrong_twins_of_reading_blocks_are_out_of_bound(bits, short_splits):
    arguments = problem(2, bits=bits, blocks=(2, 9), lengths=(3, 3))
    packed = arguments[6]
    assert agrees(attended(arguments), arguments)
    twins = {
        "zeros of keys off by one": ("key_zeros", lambda zeros: zeros + 1),
        "zeros of values off by one": ("value_zeros", lambda zeros: zeros + 1),
        "zeros of keys without a sign": ("key_zeros", lambda zeros: zeros.abs()),
        "scales one channel late": ("key_scales", lambda scales: scales.roll(1, -1)),
        "scales one entry late": ("value_scales", lambda scales: scales.roll(1, -1)),
        "halves of bytes swapped in keys": ("key_codes", lambda codes: codes << 4 | codes >> 4),
        "halves of bytes swapped in values": ("value_codes", lambda codes: codes << 4 | codes >> 4),
        "counts one entry late": ("counts", lambda counts: counts.roll(1, -1)),
        "counts dropped": ("counts", torch.ones_like),
    }
    for name, twin in twins.items():
        assert not agrees(attended(arguments, blocks=changed(packed, *twin)), arguments), name
    for changes in ({"lengths": (1, 9)}, {"lengths": (2, 8)}, {"firsts": packed.firsts[::-1]}, {"lengths": (0, 0)}):
        assert not agrees(attended(arguments, **changes), arguments), changes


def test_planes_of_three_bits_are_not_confused(short_splits):
    arguments = problem(3, bits=(3, 3))
    assert agrees(attended(arguments), arguments)
    in_order = changed(arguments[6], "key_codes", lambda codes: codes.roll(4, -1))  # the plane of one bit first
    assert not agrees(attended(arguments, blocks=in_order), arguments)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_counts_and_large_logits_of_blocks_are_within_the_bound(dtype, short_splits):
    arguments = problem(4, dtype=dtype, spread=1e2 if dtype == "f16" else 1e3, blocks=(9, 1))
    most = changed(arguments[6], "counts", lambda counts: torch.full_like(counts, 2**15 - 1))
    arguments = *arguments[:6], dataclasses.replace(arguments[6], blocks=most), *arguments[7:]
    assert agrees(attended(arguments), arguments)
    ones = changed(arguments[6], "key_zeros", torch.ones_like)
    assert not agrees(attended(arguments, blocks=ones), arguments)


def test_a_block_without_tokens_takes_no_part(short_splits):
    """A count of 0 is no entry: the first block of each head is empty, then every block."""
    arguments = problem(5, blocks=(2, 1))
    packed = arguments[6]
    for places in (packed.firsts, range(packed.blocks.shape[1])):
        index = torch.tensor(places, device=DEVICE)
        emptied = changed(packed, "counts", lambda counts, index=index: counts.index_fill(1, index, 0))
        empty = *arguments[:6], dataclasses.replace(packed, blocks=emptied), *arguments[7:]
        assert agrees(attended(empty), empty)
        assert not agrees(attended(arguments), empty)  # the wrong twin: with them


def test_without_blocks_it_is_attention_to_the_entries(short_splits):
    arguments = problem(6, blocks=(0, 0))
    *others, _, queries, scale = arguments
    expected = cell("attend_ragged", "triton")(*others, queries, scale)
    assert torch.equal(attended(arguments), expected)
    assert not torch.equal(attended(arguments, lengths=(1, 0)), expected)


def test_blocks_are_read_where_they_lie(short_splits):
    """With room behind each batch row, and bytes behind each block: the same bits."""
    arguments = problem(7, dims=(20, 20))
    blocks = arguments[6].blocks
    expected = attended(arguments)
    for room in ((0, 0, 0, 3), (0, 7, 0, 0)):
        roomy = torch.nn.functional.pad(blocks, room, value=255)[:, : blocks.shape[1], : blocks.shape[2]]
        assert torch.equal(attended(arguments, blocks=roomy), expected)
    assert not torch.equal(attended(arguments, blocks=blocks.roll(1, 0)), expected)


@pytest.mark.parametrize("rows", [1, 4, 5, 16, 17])
def test_a_program_takes_few_rows_where_each_of_them_costs(rows):
    assert packed_module.rows_of_program(rows, "cuda") == (4 if rows <= 4 else 8)
    assert packed_module.rows_of_program(rows, "hip") == 16
