"""Attention to quantized entries on CUDA: codes bit for bit, outputs within the bound, and times."""

import itertools
import statistics
from typing import Any

import torch

from benchmarks.gpu.attention import DIM, GROUP, HEADS, SEEN, tokens_outside
from benchmarks.gpu.keys import DTYPES, same_bits
from benchmarks.gpu.timings import ROUNDS, milliseconds_in_turn
from kvcluster.fast.attention import attend_entries
from kvcluster.fast.backends import cell
from kvcluster.fast.exact.blocks import BlockLayout, Packed, pack

__all__ = ["compare_packed_attention", "print_packed_timings", "time_packed_attention"]

BITS = ((8, 8), (4, 4), (3, 3), (2, 2), (4, 2))  # of keys and of values
BLOCKS, LENGTHS = (40, 3), (70, 300)  # of each KV head: blocks, and entries that are not quantized


def compare_packed_attention(interpret: bool) -> list[dict[str, Any]]:
    """Checks and misses by dtype: blocks as the CPU packs them, and the output of each new token of each KV head."""
    device = "cpu" if interpret else "cuda"
    sizes = itertools.product(BITS, (64, 80, 128, 256), (1, 7))
    if interpret:
        sizes = zip(BITS, (16, 20, 32, 5, 40), (1, 2, 1, 1, 3), strict=True)
    cases, rows = list(sizes), []
    for name, dtype in DTYPES.items():
        checks = differing = 0
        for bits, dim, queries in cases:
            checks += 1 + len(BLOCKS) * queries
            differing += misses(dtype, BlockLayout(dim, dim, bits), queries, device)
        rows.append({"dtype": name, "keys": "packed", "cases": len(cases), "checks": checks, "differing": differing})
        print(f"{name:6} {'packed':12} {len(cases):6} {checks:7} {differing:10}")
    return rows


def misses(dtype: torch.dtype, layout: BlockLayout, queries: int, device: str) -> int:
    """How many new tokens have an output outside the bound; one more if the blocks are not those of the CPU."""
    generator = torch.Generator().manual_seed(layout.dim + layout.nbytes)
    blocks, lengths = ((2, 0), (5, 30)) if device == "cpu" else (BLOCKS, LENGTHS)

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(1, *shape, layout.dim, generator=generator) + 1).to(dtype)

    old_counts, counts = (
        torch.randint(1, 300, (1, n), dtype=torch.int32, generator=generator) for n in (32 * sum(blocks), sum(lengths))
    )
    old = random(32 * sum(blocks)), random(32 * sum(blocks)), old_counts
    query, others = random(len(lengths), GROUP * queries), (random(sum(lengths)), random(sum(lengths)), counts)
    here, there = pack(*old, layout), pack(*(x.to(device) for x in old), layout)
    packed = Packed(layout, there, blocks, (0, blocks[0]))
    arguments = *(x.to(device) for x in (query, *others)), lengths, (0, lengths[0]), packed, queries, layout.dim**-0.5
    output = cell("attend_packed", "triton")(*arguments)
    wrong = int(not same_bits(there, here))
    for head, (n, first) in enumerate(zip(lengths, (0, lengths[0]), strict=True)):
        pairs = zip(packed.of_head(head), (x[:, first : first + n] for x in others), strict=True)
        entries = [torch.cat([read.cpu(), exact.to(read.dtype)], dim=1) for read, exact in pairs]
        wrong += tokens_outside(output[:, head], query[:, head], *entries, queries)
    return wrong


def time_packed_attention() -> list[dict[str, Any]]:
    """One row for every batch and number of bits: medians of attention in bfloat16, by the kernels and by torch."""
    rows = []
    for batch, bits in itertools.product((1, 8), (8, 4, 3, 2)):
        generator = torch.Generator("cuda").manual_seed(0)

        def random(*shape: int, generator: torch.Generator = generator) -> torch.Tensor:
            return torch.randn(shape, device="cuda", generator=generator).bfloat16()

        layout, n_blocks = BlockLayout(DIM, DIM, (bits, bits)), SEEN // 32
        kv = [random(1, HEADS, SEEN, DIM) for _ in range(2)]
        ones = torch.ones(1, HEADS, SEEN, dtype=torch.int32, device="cuda")
        blocks = torch.cat([pack(*(x[:, head] for x in (*kv, ones)), layout) for head in range(HEADS)], dim=1)
        blocks = blocks.repeat(batch, 1, 1)
        packed = Packed(layout, blocks, (n_blocks,) * HEADS, tuple(range(0, HEADS * n_blocks, n_blocks)))
        query, last = random(batch, HEADS, GROUP, DIM), [random(batch, HEADS, DIM) for _ in range(2)]
        counts = torch.ones(batch, HEADS, dtype=torch.int32, device="cuda")  # one new token of each head
        arguments = query, *last, counts, (1,) * HEADS, tuple(range(HEADS)), packed, 1, DIM**-0.5
        full = [x.repeat(batch, 1, 1, 1) for x in kv]
        contenders = {
            "packed": lambda of=arguments: cell("attend_packed", "triton")(*of),
            "full": lambda q=query, kv=full: attend_entries(q, *kv, None, backend="triton"),
            "torch": lambda of=arguments: cell("attend_packed", "torch")(*of),
            "read": lambda of=blocks: of.amax(),
        }
        milliseconds = milliseconds_in_turn(contenders)
        medians = {contender: statistics.median(times) for contender, times in milliseconds.items()}
        rows.append({"batch": batch, "bits": bits, "milliseconds": milliseconds, "median_milliseconds": medians})
        del kv, blocks, packed, query, last, arguments, full, contenders
        torch.cuda.empty_cache()
    return rows


def print_packed_timings(rows: list[dict[str, Any]]) -> None:
    """A plain table."""
    print(f"\nattention of {GROUP} query heads on {HEADS} KV heads, {SEEN:,} tokens in few bits, dim {DIM}, bf16")
    form = "{:>5} {:>5} {:>10} {:>13} {:>10} {:>14} {:>14} {:>13}"
    print(
        form.format(
            "batch", "bits", "packed ms", "16 bits ms", "torch ms", "full / packed", "torch / packed", "read / packed"
        )
    )
    for row in rows:
        medians = row["median_milliseconds"]
        cells = [f"{medians[name]:.3f}" for name in ("packed", "full", "torch")]
        ratios = [f"{medians[name] / medians['packed']:.2f}" for name in ("full", "torch", "read")]
        print(form.format(row["batch"], row["bits"], *cells, *ratios))
    print(f"medians of {ROUNDS} turns; full: 16 bits, by the kernels; read: the largest byte of the blocks, by torch")
