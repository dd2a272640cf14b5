"""What recall costs: one attention step beside full attention, and building the index beside the prefill it follows."""

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache

from benchmarks.recall.needles import Context
from kvcluster.evaluation.report import Claim, Line, Section
from kvcluster.evaluation.statistics import ratios
from kvcluster.evaluation.timing import seconds_in_turn
from kvcluster.fast import RecallCache, attention

__all__ = ["index_section", "time_index", "time_step"]

MOST_STEP, MOST_INDEX = 1 / 8, 0.10
SHAPE = (8, 4, 128)
Advance = Callable[[], object]  # moves a progress bar


@torch.inference_mode()
def time_step(
    tokens: int,
    budget: int,
    rounds: int,
    advance: Advance,
    *,
    shape: tuple[int, int, int] = SHAPE,
    most: float = MOST_STEP,
    with_query_heads: bool = False,
) -> Section:
    """Seconds of one decoding step's attention, selection included; `shape` is KV heads, queries of each, dim.

    `with_query_heads` times also a cache whose query heads choose alone.
    """
    heads, group, dim = shape
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(1, heads, tokens, dim, generator=generator) for _ in range(2))
    query = torch.randn(1, heads, group, dim, generator=generator)
    ours = {"RecallCache.attend": RecallCache(budget=budget)}
    if with_query_heads:
        ours["RecallCache.attend, each query head its own tokens"] = RecallCache(budget=budget, is_per_query_head=True)
    for cache in ours.values():
        cache.append(keys, values)

    def plain() -> torch.Tensor:
        return (query @ keys.mT * dim**-0.5).softmax(dim=-1) @ values

    full = {
        "full: torch's scaled_dot_product_attention": lambda: scaled_dot_product_attention(query, keys, values),
        "full: two matrix products": plain,
        "full: kvcluster.fast.attention": lambda: attention(query, keys, values),
    }
    recalling = {name: partial(cache.attend, query) for name, cache in ours.items()}
    seconds = seconds_in_turn({**full, **recalling}, rounds, advance)
    best = min(full, key=lambda name: statistics.median(seconds[name]))
    lines = []
    for name, times in seconds.items():
        ratio = ratios(times, seconds[best])
        is_ours = name not in full
        claim = Claim("time of a recalling step over the best full one", ratio.median, most) if is_ours else None
        speedup = ratios(seconds[best], times)
        lines.append(
            Line((name, f"{1e3 * statistics.median(times):.2f} ms", f"{ratio.median:.3f}", str(speedup)), claim)
        )
    return Section(
        f"Time of one attention step: {heads} KV heads x {group} queries x {dim} dims, {tokens:,} tokens, float32, "
        f"budget {budget:,}",
        ("attention", "median", "of best full", "times faster than best full"),
        lines,
        f"Last column: median (least to largest) of {rounds} turns. Random normal keys; selection included.",
        {"seconds": seconds, "best_full": best},
    )


@torch.inference_mode()
def time_index(model: Any, context: Context, budget: int, rounds: int, advance: Advance) -> Section:
    """Seconds of a prefill and of clustering its keys in every layer."""
    tokens = torch.tensor([context.tokens])

    def prefill() -> DynamicCache:
        cache = DynamicCache(config=model.config)
        model(tokens, past_key_values=cache, logits_to_keep=1)
        return cache

    full = prefill()

    def build() -> None:
        """As a prefill would, one layer after the other; the tokens are copied into the cache as well."""
        for layer in full.layers:
            RecallCache(budget=budget).append(layer.keys, layer.values)

    seconds = seconds_in_turn({"prefill": prefill, "index": build}, rounds, advance)
    return index_section("SmolLM2-135M", len(context.tokens), len(full.layers), seconds, MOST_INDEX)


def index_section(name: str, n_tokens: int, n_layers: int, seconds: dict[str, list[float]], most: float) -> Section:
    """What a prefill of the model `name` took and what clustering its keys did; of one prefill or one each turn."""
    prefills = seconds["prefill"] * (len(seconds["index"]) if len(seconds["prefill"]) == 1 else 1)
    share = ratios(seconds["index"], prefills)
    claim = Claim("share of the prefill that the index costs", share.median, most)
    prefill_time, index_time = (f"{statistics.median(seconds[name]):.2f} s" for name in ("prefill", "index"))
    spread = f"{share.median:.1%} ({share.low:.1%} to {share.high:.1%})"
    rounds = len(seconds["index"])
    return Section(
        f"Time of the index: {name}, {n_tokens:,} tokens, {n_layers} layers that attend to everything, float32",
        ("what", "median", "share of the prefill"),
        [Line(("prefill", prefill_time, "100 %")), Line(("cluster every layer", index_time, spread), claim, "{:.0%}")],
        f"Median (least to largest) of {rounds} shares, "
        + ("each of one turn." if len(seconds["prefill"]) > 1 else "all of the same prefill."),
        {"seconds": seconds},
    )
