"""What our cache adds to each layer of a decoding step, beside a stock one: `python benchmarks/checks/step.py`.

A random Llama of thirty layers so small that little but Python is timed: hooks, checks, views, calls. Steps of all
caches are taken in turn; the few that cluster a chunk do not move the median. `--processor` as in `run.py`.
"""

import argparse
import statistics
import time

import torch
from rich.console import Console
from rich.table import Table
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from kvcluster.evaluation.machine import describe
from kvcluster.evaluation.timing import seconds_in_turn
from kvcluster.fast.huggingface import ClusteredCache

__all__ = ["main"]

LAYERS, PROMPT, STEPS = 30, 300, 100
MODEL = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 2}
RULES = {"keep_ratio": 0.25, "chunk_size": 64, "n_sink": 4, "n_recent": 64, "profile": None}


def main() -> None:
    """Print microseconds of a step for each layer."""
    parser = argparse.ArgumentParser(description="What our cache adds to each layer of a decoding step.")
    parser.add_argument("--processor", action="store_true", help="time of the processor, not of the clock; one thread")
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=LAYERS, **MODEL)).eval()
    caches = {
        "stock": DynamicCache(config=model.config),
        "full, ours": ClusteredCache.for_model(model, **RULES | {"keep_ratio": 1.0}),
        "clustered": ClusteredCache.for_model(model, **RULES),
        "clustered, four bits": ClusteredCache.for_model(model, **RULES, bits=4),
    }
    clock = time.process_time if arguments.processor else time.perf_counter
    with torch.no_grad():
        for cache in caches.values():
            model(torch.randint(64, (1, PROMPT)), past_key_values=cache)
        token = torch.zeros(1, 1, dtype=torch.int64)
        steps = {name: lambda cache=cache: model(token, past_key_values=cache) for name, cache in caches.items()}
        seconds = seconds_in_turn(steps, arguments.steps, clock=clock)
    console = Console(width=120)
    console.print(", ".join(f"{name} {value}" for name, value in describe().items()))
    table = Table(title=f"Microseconds of a step, for each of {LAYERS} layers", title_justify="left")
    for name in ("cache", "a layer", "above stock", "ratio to stock (middle half)"):
        table.add_column(name, justify="left" if name == "cache" else "right")
    for name, times in seconds.items():
        more = statistics.median(a - b for a, b in zip(times, seconds["stock"], strict=True))
        low, middle, high = statistics.quantiles([a / b for a, b in zip(times, seconds["stock"], strict=True)], n=4)
        of_layer = (f"{1e6 * x / LAYERS:.0f}" for x in (statistics.median(times), more))
        table.add_row(name, *of_layer, f"{middle:.2f} ({low:.2f} to {high:.2f})")
    console.print(table)


if __name__ == "__main__":
    main()
