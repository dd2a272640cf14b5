"""What two tiers cost and save while a model generates: hit rates, bytes moved, time beside the cache in memory."""

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.recall.needles import Context
from kvcluster.evaluation.quality.llama import read_layers
from kvcluster.evaluation.report import Line, Section
from kvcluster.evaluation.statistics import ratios
from kvcluster.evaluation.timing import seconds_in_turn
from kvcluster.fast.huggingface import RecallCache

__all__ = ["time_tiers"]

STEPS_HELD = (1, 2, 4, 8)


@torch.inference_mode()
def time_tiers(model: Any, context: Context, budget: int, n_new: int, advance: Callable[[], object]) -> Section:
    """Greedy generation by the model after a context; two tiers give the tokens of memory, or this raises."""
    layers = read_layers(model, context.tokens)
    options: dict[str, dict[str, Any]] = {"in memory": {}}
    options |= {f"two tiers, clusters of the last {n} steps": {"offloading": True, "n_steps": n} for n in STEPS_HELD}
    options |= {f"4 bits, {name}": {**of, "bits": 4} for name, of in options.items() if of.get("n_steps", 1) == 1}
    caches = {
        name: filled(RecallCache.for_model(model, budget=budget, **settings), layers)
        for name, settings in options.items()
    }
    next_tokens = {name: torch.tensor([context.tokens[-1:]]) for name in caches}

    def step(name: str) -> Callable[[], None]:
        def run() -> None:
            logits = model(next_tokens[name], past_key_values=caches[name]).logits
            next_tokens[name] = logits[:, -1:].argmax(dim=-1)

        return run

    seconds = seconds_in_turn({name: step(name) for name in caches}, n_new, advance)
    for bits in ("", "4 bits"):
        tokens = {int(token) for name, token in next_tokens.items() if name.startswith("4 bits") == bool(bits)}
        if len(tokens) != 1:
            raise RuntimeError(f"the tiers must generate the tokens of memory, got other ones {bits}")
    lines = []
    for name, cache in caches.items():
        ratio = str(ratios(seconds[name], seconds["in memory"]))
        statistics = cache.statistics
        if statistics is None:
            lines.append(Line((name, "", "", "", ratio)))
            continue
        moved = statistics.nbytes_moved / (n_new + 1) / 1e6
        evicted = statistics.n_evicted / (n_new + 1)
        lines.append(Line((name, f"{statistics.hit_rate:.0%}", f"{moved:.2f}", f"{evicted:,.0f}", ratio)))
    return Section(
        f"Two tiers: SmolLM2-135M, {len(context.tokens):,} tokens, budget {budget}, {n_new} generated, a file behind",
        ("keys and values", "hit rate", "MB moved / token", "clusters evicted / token", "time / in memory"),
        lines,
        "All layers and KV heads together. The file lies in the system's folder for temporary files.",
        {"seconds": seconds},
    )


def filled(cache: RecallCache, layers: list[tuple[torch.Tensor, torch.Tensor]]) -> RecallCache:
    """The cache after a prefill of all tokens but the last, from which generation starts."""
    for layer, (keys, values) in zip(cache.layers, layers, strict=True):
        held = keys[None, :, :-1], values[None, :, :-1]
        layer.lazy_initialization(*held)
        layer.cache.caches[0].append(*held)
    return cache
