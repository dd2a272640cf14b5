"""A decoding step with all tokens in four bits: ours and transformers' `QuantizedCache`, beside full caches.

Needs optimum-quanto or hqq for the rows of `QuantizedCache`, see README.md. Bytes: held after the prompt, as torch says
for ours, over those of all tokens.
"""

import argparse
import importlib.util
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
from rich.markdown import Markdown
from rich.progress import Progress
from transformers import DynamicCache, QuantizedCache
from transformers.utils.logging import disable_progress_bar

from kvcluster.evaluation.models import load_llama, smollm2_folder
from kvcluster.evaluation.pages import table
from kvcluster.evaluation.statistics import ratios
from kvcluster.evaluation.texts import built_in_text, encode
from kvcluster.evaluation.timing import seconds_in_turn
from kvcluster.fast.huggingface import ClusteredCache

__all__ = ["main"]

FULL = "transformers, all tokens"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Steps with all tokens in four bits.")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    disable_progress_bar()
    model, tokenizer = load_llama(smollm2_folder())
    tokens = torch.tensor([encode(tokenizer, built_in_text())[: arguments.tokens + 1]])
    caches = caches_of(model)
    with Progress() as progress, torch.inference_mode():
        reading = progress.add_task("prompts", total=len(caches))
        for cache in caches.values():
            model(tokens[:, :-1], past_key_values=cache, logits_to_keep=1)
            progress.advance(reading)
        bar = progress.add_task("steps", total=len(caches) * (arguments.rounds + 1))
        steps = {name: step(model, tokens[:, -1:], cache) for name, cache in caches.items()}
        seconds = seconds_in_turn(steps, arguments.rounds, lambda: progress.advance(bar))
    full = sum(x.nbytes for layer in caches[FULL].layers for x in (layer.keys, layer.values))
    rows = [[name, str(ratios(seconds[FULL], seconds[name])), *bytes_of(cache, full)] for name, cache in caches.items()]
    head = ["cache", f"{FULL} / this", "bytes", "reserved"]
    Console().print(Markdown(f"{arguments.tokens:,} tokens, one sequence:\n\n" + table(head, rows)))


def caches_of(model: Any) -> dict[str, Any]:
    """Each by its name."""
    caches: dict[str, Any] = {FULL: DynamicCache(config=model.config)}
    for backend, package, axes in (("quanto", "optimum", {}), ("hqq", "hqq", {"axis_key": 1, "axis_value": 1})):
        if importlib.util.find_spec(package) is not None:
            name = f"QuantizedCache, 4 bits ({backend})"
            caches[name] = QuantizedCache(backend=backend, config=model.config, nbits=4, **axes)
    few = {"bits": 4, "n_exact": 32}
    caches["ours, all tokens"] = ClusteredCache.for_model(model, keep_ratio=1)
    caches["ours, all tokens but 32 in 4 bits"] = ClusteredCache.for_model(model, keep_ratio=1, **few)
    caches["ours, a quarter in 4 bits"] = ClusteredCache.for_model(model, keep_ratio=0.25, **few)
    return caches


def step(model: Any, token: torch.Tensor, cache: Any) -> Callable[[], object]:
    return lambda: model(token, past_key_values=cache)


def bytes_of(cache: Any, full: int) -> tuple[str, str]:
    """What entries take and what is held, over all tokens; empty for transformers', whose codes keep no count."""
    if not isinstance(cache, ClusteredCache):
        return ("", "")
    reserved = sum(each.nbytes_reserved for layer in cache.own_layers for each in layer.cache.caches)
    return f"{cache.nbytes / full:.3f}", f"{reserved / full:.3f}"


if __name__ == "__main__":
    main()
