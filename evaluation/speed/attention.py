"""Attention alone: one new token against 32,768 tokens, full and clustered, beside the bandwidth of plain reading."""

import statistics
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from kvcluster.fast.attention import attend_entries

from ..machine import read_all
from ..report import Claim, Line, Section
from ..statistics import ratios
from ..timing import seconds_in_turn
from .contenders import CHUNK_SIZE, N_RECENT, N_SINK

__all__ = ["SHAPE", "attention_alone", "n_stored"]

SHAPE = {"kv_heads": 8, "group": 4, "dim": 128}
KEEP_RATIOS = (0.25, 0.2)
LEAST_SPEEDUP = 0.9  # of seen / stored
LEAST_BANDWIDTH = {torch.float32: 0.8, torch.bfloat16: 0.7}  # of what plain reading attains


def n_stored(n_seen: int, keep_ratio: float) -> int:
    """Entries of a cache that has seen `n_seen` tokens."""
    chunks = max(0, n_seen - N_SINK - N_RECENT) // CHUNK_SIZE
    return n_seen - chunks * (CHUNK_SIZE - -int(-keep_ratio * CHUNK_SIZE // 1))


def attention_alone(
    n_seen: int, batches: tuple[int, ...], rounds: int, advance: Callable[[], object], shape: dict[str, int] = SHAPE
) -> Section:
    """Seconds of one step of attention, in turn."""
    lines: list[Line] = []
    numbers: list[dict[str, Any]] = []
    for dtype in (torch.float32, torch.bfloat16):
        for batch in batches:
            times = measured(dtype, batch, n_seen, rounds, advance, shape)
            numbers.append(times)
            lines += lines_of(dtype, batch, times)
    heads = f"{shape['kv_heads']} KV heads of {shape['group']} query heads, dim {shape['dim']}"
    return Section(
        f"1. Attention alone, {n_seen:,} tokens seen, {heads}",
        ("cache", "entries", "ms", "full (ours) / this", "share of the read bandwidth"),
        lines,
        "Read bandwidth: a plain sum over the same keys and values, in the same turns. transformers: its function for "
        "`sdpa`, on keys and values that need no copy.",
        {"runs": numbers},
    )


def measured(
    dtype: torch.dtype, batch: int, n_seen: int, rounds: int, advance: Callable[[], object], shape: dict[str, int]
) -> dict[str, Any]:
    """Seconds and bytes of every contender."""
    kv_heads, group, dim = shape["kv_heads"], shape["group"], shape["dim"]
    query = torch.randn(batch, kv_heads * group, 1, dim).to(dtype)
    rows = query.reshape(batch, kv_heads, group, dim)
    module: Any = SimpleNamespace(num_key_value_groups=group, is_causal=True)
    contenders: dict[str, Callable[[], object]] = {}
    reads: dict[str, Callable[[], object]] = {}
    entries: dict[str, int] = {}
    sizes = {"full": n_seen} | {f"clustered {ratio}": n_stored(n_seen, ratio) for ratio in KEEP_RATIOS}
    for name, kept in sizes.items():
        keys, values = (torch.randn(batch, kv_heads, kept, dim, dtype=torch.float32).to(dtype) for _ in range(2))
        counts = torch.randint(1, 9, (batch, kv_heads, kept), dtype=torch.int32)
        if name == "full":
            entries["transformers"] = kept
            contenders["transformers"] = partial(sdpa_attention_forward, module, query, keys, values, None)
        entries[name] = kept
        contenders[name] = partial(attend_entries, rows, keys, values, counts)
        reads[f"read {name}"] = partial(read_all, [keys, values])
    contenders |= reads  # last, so that none reads what its contender has just left in the processor's cache
    with torch.inference_mode():
        seconds = seconds_in_turn(contenders, rounds, advance)
    return {"dtype": str(dtype).removeprefix("torch."), "batch": batch, "seconds": seconds, "entries": entries}


def lines_of(dtype: torch.dtype, batch: int, times: dict[str, Any]) -> list[Line]:
    seconds: dict[str, list[float]] = times["seconds"]
    lines = []
    for name, entries in times["entries"].items():
        speedup = ratios(seconds["full"], seconds[name])
        share = ratios(seconds["read full" if name == "transformers" else f"read {name}"], seconds[name])
        label = f"{name}, {times['dtype']}, batch {batch}"
        cells = (label, f"{entries:,}", f"{1e3 * statistics.median(seconds[name]):.2f}", str(speedup), str(share))
        is_clustered = name.startswith("clustered")
        claim = Claim(f"bandwidth of {label}", share.median, LEAST_BANDWIDTH[dtype], is_least=True)
        lines.append(Line(cells, claim if is_clustered else None))
        if is_clustered:
            least = LEAST_SPEEDUP * times["entries"]["full"] / entries
            claim_of_speedup = Claim(f"speedup of {label}", speedup.median, least, is_least=True)
            lines.append(Line(("  its speedup", "", "", f"{speedup.median:.2f}", ""), claim_of_speedup, "{:.2f}"))
    return lines
