"""What heads with shares of their own cost and save in a step of decoding: `python benchmarks/tuning/step.py`.

Attention of one new token to all layers that hold entries, with random keys and values of a model's shapes: the full
cache, all heads alike, the shares of the model's profile at the same number of entries, and the same heads padded to
one rectangle a layer, as caches without offsets have to hold them. In turn, in one process; bytes are those of memory
held. No model is run.
"""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # of a script only its own folder is on the path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from kvcluster.evaluation.statistics import ratios
from kvcluster.evaluation.timing import seconds_in_turn
from kvcluster.fast import ClusteredCache, Distinctive, RaggedCache
from kvcluster.fast.attention import attend_entries
from kvcluster.fast.huggingface import Profile
from kvcluster.fast.huggingface.profiles import shipped

__all__ = ["main", "padded"]

SHAPES = {"SmolLM2": (3, 3, 64), "Gemma": (1, 4, 256)}  # KV heads, query heads of each, features
SIZES: dict[str, Any] = {"chunk_size": 256, "n_sink": 4, "n_recent": 252, "method": Distinctive()}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description="Attention of a step with the shares of a profile.")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--keep", type=float, default=0.25)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=None, help="of torch")
    arguments = parser.parse_args()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    console = Console(width=None if sys.stdout.isatty() else 120)
    with Progress(console=console, transient=True) as progress:
        for profile in shipped():
            for name in DTYPES:
                measure(console, progress, profile, name, arguments)


def measure(console: Console, progress: Progress, profile: Profile, dtype: str, arguments: argparse.Namespace) -> None:
    """One model in one dtype."""
    kv_heads, group, dim = next(shape for name, shape in SHAPES.items() if profile.name.startswith(name))
    ratios_of_layers = profile.keep_ratios(arguments.keep, chunk_size=256, n_layers=max(profile.layers) + 1)
    generator = torch.Generator().manual_seed(0)
    shape = arguments.batch, kv_heads, arguments.tokens, dim
    tokens = [torch.randn(shape, generator=generator).to(DTYPES[dtype]) for _ in range(2)]
    query = torch.randn(arguments.batch, kv_heads, group, dim, generator=generator).to(DTYPES[dtype])
    task = progress.add_task(f"{profile.name}, {dtype}: fill", total=2 * len(profile.layers))
    alike, ragged = [], []
    for layer in profile.layers:
        of_layer = ratios_of_layers[layer]
        alike.append(filled(ClusteredCache(keep_ratio=arguments.keep, **SIZES), tokens))
        progress.advance(task)
        of_heads = of_layer if isinstance(of_layer, tuple) else (of_layer,) * kv_heads
        ragged.append(filled(RaggedCache(keep_ratios=of_heads, **SIZES), tokens))
        progress.advance(task)
    rectangles = [padded(cache) for cache in ragged]
    scale = dim**-0.5
    contenders: dict[str, Callable[[], object]] = {
        "full cache": lambda: [attend_entries(query, *tokens, None) for _ in profile.layers],
        "all heads alike": lambda: [cache.attend_rows(query, queries=1, scale=scale) for cache in alike],
        "shares of the profile": lambda: [cache.attend_rows(query, queries=1, scale=scale) for cache in ragged],
        "the same, padded": lambda: [attend_entries(query, *arrays) for arrays in rectangles],
    }
    nbytes = {
        "full cache": len(profile.layers) * sum(x.nbytes for x in tokens),
        "all heads alike": sum(cache.nbytes_reserved for cache in alike),
        "shares of the profile": sum(cache.nbytes_reserved for cache in ragged),
        "the same, padded": sum(x.nbytes for arrays in rectangles for x in arrays),
    }
    turns = progress.add_task(f"{profile.name}, {dtype}: steps", total=(arguments.rounds + 1) * len(contenders))
    seconds = seconds_in_turn(contenders, arguments.rounds, lambda: progress.advance(turns))
    of = f"{arguments.batch} x {arguments.tokens:,} tokens, {arguments.keep:g} kept of the body"
    table = Table(title=f"{profile.name}, {dtype}, {of}")
    for column in ("", "entries of a head", "bytes of full", "time of full"):
        table.add_column(column, justify="left" if not column else "right")
    entries = {
        "full cache": float(arguments.tokens),
        "all heads alike": sum(cache.mean_entries for cache in alike) / len(alike),
        "shares of the profile": sum(cache.mean_entries for cache in ragged) / len(ragged),
        "the same, padded": sum(arrays[2].shape[-1] for arrays in rectangles) / len(rectangles),
    }
    for name in contenders:
        share = nbytes[name] / nbytes["full cache"]
        table.add_row(name, f"{entries[name]:,.0f}", f"{share:.3f}", str(ratios(seconds[name], seconds["full cache"])))
    console.print(table)


def filled(cache: Any, tokens: list[Tensor]) -> Any:
    """The cache after it has clustered these tokens, with what it needs for one more."""
    cache.extend(*tokens)
    cache.cluster()
    return cache


def padded(cache: RaggedCache) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values and counts of all heads in one rectangle, as long as the longest head."""
    entries = cache.entries()
    assert entries is not None
    return entries


if __name__ == "__main__":
    main()
