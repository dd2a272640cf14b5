"""Our attention to vLLM's pages beside vLLM's own kernel, on the same entries, none of them clustered (keep 1).

Batches of decoding requests with the heads of SmolLM2. Each call reads the pages of another of 30 layers, as in a
model, so that the call before has not left them in the processor's cache, unless they all fit. Kernels come in turn.
"""

import os
import time

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from vllm import _custom_ops as ops
from vllm.platforms import current_platform

from kvcluster.evaluation.statistics import ratios
from kvcluster.evaluation.timing import seconds_in_turn
from kvcluster.fast.cpu.paged import attend_pages

__all__ = ["measure_attention", "show_attention"]

PAGE, HEADS, KV_HEADS, DIM, LAYERS = 32, 9, 3, 64, 30
BATCHES, LENGTHS, DTYPES = (1, 4, 16), (512, 1024, 2048, 4096), (torch.float32, torch.bfloat16)
MOST = 1.2  # ours / stock
ENTRIES = 100_000  # at least so many per turn, so that small problems are timed for long enough


def layer(batch, length, dtype, generator):
    """One layer's calls: stock and ours, each on pages of its own with the same entries in another order of blocks."""
    blocks = batch * length // PAGE
    both = torch.randn(blocks, KV_HEADS, PAGE, 2 * DIM, generator=generator).to(dtype)
    cells = torch.zeros(blocks, KV_HEADS, PAGE * (2 * DIM + 4 // dtype.itemsize), dtype=dtype)
    cells[..., : PAGE * 2 * DIM] = both.flatten(2)
    table = torch.randperm(blocks, generator=generator).reshape(batch, -1).int()
    query = torch.randn(batch, HEADS, DIM, generator=generator).to(dtype)
    keys, values = both.view(blocks, KV_HEADS, 2 * PAGE, DIM).chunk(2, dim=2)
    output, starts = torch.empty_like(query), torch.arange(batch + 1, dtype=torch.int32)
    lengths = torch.full((batch,), length, dtype=torch.int32)
    plan = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=batch,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=DIM,
        seq_lens=lengths,
        dtype=dtype,
        query_start_loc=starts,
        causal=True,
        sliding_window_size=-1,
        isa="vec",
        enable_kv_split=True,
    )
    requests = torch.tensor([(row, 1, length, 0, 0) for row in range(batch)])

    def stock():
        ops.cpu_attention_with_kv_cache(
            query=query,
            key_cache=keys,
            value_cache=values,
            output=output,
            query_start_loc=starts,
            seq_lens=lengths,
            scale=DIM**-0.5,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=table,
            softcap=0,
            scheduler_metadata=plan,
            s_aux=None,
        )
        return output

    def ours():
        return attend_pages(query, cells, table, requests, page=PAGE, scale=DIM**-0.5)

    return stock, ours


def turns(layers, rounds, repeats, clock):
    """Seconds of stock and of ours for a layer, a turn each, all layers in every turn."""

    def repeat(calls):
        for _ in range(repeats):
            for call in calls:
                call()

    contenders = dict(zip(("stock", "ours"), zip(*layers, strict=True), strict=True))
    runs = {name: lambda calls=calls: repeat(calls) for name, calls in contenders.items()}
    seconds = seconds_in_turn(runs, rounds, clock=clock)
    return {name: [second / repeats / len(layers) for second in times] for name, times in seconds.items()}


def measure_attention(rounds, is_processor_time):
    """Every dtype, batch and length, and the machine they ran on."""
    current_platform.import_kernels()
    if is_processor_time:
        torch.set_num_threads(1)
    clock = time.process_time if is_processor_time else time.perf_counter
    generator = torch.Generator().manual_seed(0)
    cases = [(dtype, batch, length) for dtype in DTYPES for batch in BATCHES for length in LENGTHS]
    rows, load = [], os.getloadavg()[0]
    for dtype, batch, length in track(cases, description="Attention"):
        n_layers = min(LAYERS, max(4, 2**31 // (batch * length * KV_HEADS * 2 * DIM * 8)))  # what memory allows
        layers = [layer(batch, length, dtype, generator) for _ in range(n_layers)]
        seconds = turns(layers, rounds, max(1, ENTRIES // (batch * length)), clock)
        name = str(dtype).removeprefix("torch.")
        rows.append({"dtype": name, "batch": batch, "entries": length, **seconds})
    about = {"threads": torch.get_num_threads(), "load": round(load, 2), "layers": LAYERS}
    about["seconds"] = "processor time of one thread" if is_processor_time else "wall"
    return {"about": about, "found": rows}


def show_attention(rows):
    """A table with the medians, and whether the target is met."""
    table = Table(title=f"Attention of a layer to exact entries, microseconds; at most {MOST} of stock's is asked for")
    for column in ("dtype", "batch", "entries", "vLLM", "ours", "ours / vLLM", ""):
        table.add_column(column, justify="right")
    for row in rows:
        ratio = ratios(row["ours"], row["stock"])
        times = (f"{1e6 * sorted(row[name])[len(row[name]) // 2]:,.0f}" for name in ("stock", "ours"))
        sizes = (row["dtype"], str(row["batch"]), f"{row['entries']:,}")
        table.add_row(*sizes, *times, str(ratio), "holds" if ratio.median <= MOST else "does not hold")
    Console(width=120).print(table)
