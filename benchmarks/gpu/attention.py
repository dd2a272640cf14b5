"""Attention on CUDA: within the bound of the reference, and timed beside torch's own."""

import statistics
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.gpu.keys import DTYPES, to_float32
from benchmarks.gpu.timings import ROUNDS, milliseconds_in_turn
from kvcluster.fast.attention import attend_entries
from kvcluster.reference.agreement import EPS, baselines, error_bound, largest_difference
from kvcluster.reference.clustered_attention import clustered_attention

__all__ = ["DIM", "GROUP", "HEADS", "SEEN"]
__all__ += ["compare_attention", "print_attention_timings", "time_attention", "tokens_outside"]

HEADS, GROUP, DIM = 8, 4, 128
SEEN, STORED = 32_768, 8_288  # tokens, and entries of a clustered cache that keeps a quarter of them


def compare_attention(interpret: bool) -> list[dict[str, Any]]:
    """Checks and misses by dtype: outputs of each row against the oracle on the entries that it may see."""
    sizes = ((1, 1, 16), (70, 5, 20)) if interpret else ((1, 1, 64), (63, 1, 80), (1000, 7, 128), (5000, 1, 256))
    rows = []
    for name, dtype in DTYPES.items():
        checks = differing = 0
        for entries, queries, dim in sizes:
            for most in (1, 100_000):
                checks += queries
                differing += misses(dtype, entries, queries, dim, most, "cpu" if interpret else "cuda")
        rows.append({"dtype": name, "keys": "attention", "cases": 2 * len(sizes), "checks": checks})
        rows[-1]["differing"] = differing
        print(f"{name:6} {'attention':12} {2 * len(sizes):6} {checks:7} {differing:10}")
    return rows


def misses(dtype: torch.dtype, entries: int, queries: int, dim: int, most: int, device: str) -> int:
    """How many new tokens have an output outside the bound."""
    generator = torch.Generator().manual_seed(entries + most)
    query = torch.randn(1, 2, GROUP * queries, dim, generator=generator).to(dtype)
    keys, values = (torch.randn(1, 2, entries, dim, generator=generator).to(dtype) for _ in range(2))
    counts = torch.randint(1, most + 1, (1, 2, entries), dtype=torch.int32, generator=generator)
    there = [x.to(device) for x in (query, keys, values, counts)]
    output = attend_entries(*there, queries=queries, backend="triton")
    return tokens_outside(output, query, keys, values, counts, queries)


def tokens_outside(output: Tensor, query: Tensor, keys: Tensor, values: Tensor, counts: Tensor, queries: int) -> int:
    """How many of the new tokens, the last `queries` entries, have an output outside the bound of `query`'s dtype."""
    entries, wrong = keys.shape[-2], 0
    for token in range(queries):
        seen = entries - queries + token + 1
        q = to_float32(query[..., token::queries, :])
        k, v, n = to_float32(keys[..., :seen, :]), to_float32(values[..., :seen, :]), counts[..., :seen].numpy()
        oracle = clustered_attention(q, k, v, n)
        ours = to_float32(output[..., token::queries, :])
        errors = [largest_difference(baseline, oracle) for baseline in baselines(q, k, v, n, None)]
        bound = error_bound(errors, oracle, EPS[str(query.dtype).removeprefix("torch.")])
        # Inputs are 16-bit numbers in float32 here: the baseline rounds less than it may, so the bound is stricter.
        wrong += not bool((largest_difference(ours, oracle) <= bound).all())
    return wrong


def time_attention() -> list[dict[str, Any]]:
    """One row for every batch and dtype: medians of full and clustered attention by the kernels and by torch."""
    rows = []
    for batch in (1, 8):
        for name, dtype in DTYPES.items():
            generator = torch.Generator("cuda").manual_seed(0)

            def random(*shape: int, dtype: torch.dtype = dtype, generator: torch.Generator = generator):
                return torch.randn(shape, device="cuda", generator=generator).to(dtype)

            query = random(batch, HEADS, GROUP, DIM)
            full = [random(batch, HEADS, SEEN, DIM) for _ in range(2)]
            stored = [random(batch, HEADS, STORED, DIM) for _ in range(2)]
            counts = torch.full((batch, HEADS, STORED), 4, dtype=torch.int32, device="cuda")
            contenders = {
                "full": lambda q=query, kv=full: attend_entries(q, *kv, None, backend="triton"),
                "torch": lambda q=query, kv=full: scaled_dot_product_attention(q, *kv),
                "clustered": lambda q=query, kv=stored, n=counts: attend_entries(q, *kv, n, backend="triton"),
                "read": lambda kv=stored: [x.amax() for x in kv],
            }
            milliseconds = milliseconds_in_turn(contenders)
            medians = {contender: statistics.median(times) for contender, times in milliseconds.items()}
            rows.append({"batch": batch, "dtype": name, "milliseconds": milliseconds, "median_milliseconds": medians})
            del query, full, stored, counts, contenders
            torch.cuda.empty_cache()
    return rows


def print_attention_timings(rows: list[dict[str, Any]]) -> None:
    """A plain table."""
    print(f"\nattention of {GROUP} query heads on {HEADS} KV heads, {SEEN:,} tokens or {STORED:,} entries, dim {DIM}")
    form = "{:>5} {:6} {:>10} {:>10} {:>13} {:>18} {:>15}"
    print(form.format("batch", "dtype", "full ms", "torch ms", "clustered ms", "full / clustered", "read / clustered"))
    for row in rows:
        medians = row["median_milliseconds"]
        cells = [f"{medians[name]:.3f}" for name in ("full", "torch", "clustered")]
        ratios = [f"{medians[name] / medians['clustered']:.2f}" for name in ("full", "read")]
        print(form.format(row["batch"], row["dtype"], *cells, *ratios))
    print(f"medians of {ROUNDS} turns; read: the largest number of the same keys and values, by torch")
