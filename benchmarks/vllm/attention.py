"""Our attention to vLLM's pages beside vLLM's own kernel, on the same entries, none of them clustered (keep 1).

Batches of decoding requests with the heads of SmolLM2. Each call reads the pages of another of 30 layers, as in a
model, so that they do not lie in the processor's cache from the call before, unless they all fit. Kernels come in
turn. Writes serving-attention.json beside this file.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # of a script only its own folder is on the path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from vllm import _custom_ops as ops
from vllm.platforms import current_platform

from kvcluster.evaluation.statistics import ratios
from kvcluster.fast.cpu.paged import attend_pages

PAGE, HEADS, KV_HEADS, DIM, LAYERS = 32, 9, 3, 64, 30
BATCHES, LENGTHS, DTYPES = (1, 4, 16), (512, 1024, 2048, 4096), (torch.float32, torch.bfloat16)
MOST = 1.2  # ours / stock
ENTRIES = 100_000  # that a turn attends to at least, so that small problems are timed for long enough
RESULTS = Path(__file__).resolve().parent / "results" / "attention.json"


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
    """Seconds of stock and of ours, a turn each, all layers in every turn; the first turn is not counted."""
    seconds = ([], [])
    for turn in range(rounds + 1):
        for kernel, of_kernel in zip(zip(*layers, strict=True), seconds, strict=True):
            start = clock()
            for _ in range(repeats):
                for call in kernel:
                    call()
            if turn > 0:
                of_kernel.append((clock() - start) / repeats / len(layers))
    return seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--processor-time", action="store_true", help="one thread and its processor time: where others use the machine"
    )
    parser.add_argument("--json", type=Path, default=RESULTS)
    asked = parser.parse_args()
    current_platform.import_kernels()
    if asked.processor_time:
        torch.set_num_threads(1)
    clock = time.process_time if asked.processor_time else time.perf_counter
    generator = torch.Generator().manual_seed(0)
    cases = [(dtype, batch, length) for dtype in DTYPES for batch in BATCHES for length in LENGTHS]
    found, load = [], os.getloadavg()[0]
    for dtype, batch, length in track(cases, description="Attention"):
        n_layers = min(LAYERS, max(4, 2**31 // (batch * length * KV_HEADS * 2 * DIM * 8)))  # what memory allows
        layers = [layer(batch, length, dtype, generator) for _ in range(n_layers)]
        stock, ours = turns(layers, asked.rounds, max(1, ENTRIES // (batch * length)), clock)
        name = str(dtype).removeprefix("torch.")
        found.append({"dtype": name, "batch": batch, "entries": length, "stock": stock, "ours": ours})
    about = {"threads": torch.get_num_threads(), "load": round(load, 2), "layers": LAYERS}
    about["seconds"] = "processor time of one thread" if asked.processor_time else "wall"
    asked.json.write_text(json.dumps({"about": about, "found": found}) + "\n")
    table = Table(title=f"Attention of a layer to exact entries, microseconds; at most {MOST} of stock's is asked for")
    for column in ("dtype", "batch", "entries", "vLLM", "ours", "ours / vLLM", ""):
        table.add_column(column, justify="right")
    for each in found:
        ratio = ratios(each["ours"], each["stock"])
        times = (f"{1e6 * sorted(each[name])[len(each[name]) // 2]:,.0f}" for name in ("stock", "ours"))
        sizes = (each["dtype"], str(each["batch"]), f"{each['entries']:,}")
        table.add_row(*sizes, *times, str(ratio), "holds" if ratio.median <= MOST else "does not hold")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
