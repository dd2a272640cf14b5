"""ClusterKV's headline on Gemma 3 270M: 32,000 tokens, of which a step reads 1,024 or 2,048; in one tier and in two.

The scores of needles and tasks at this length are those of `benchmarks/lengths`.
"""

import copy
import ctypes
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from benchmarks.recall.timing import index_section, time_step
from kvcluster.evaluation.models import load_model
from kvcluster.evaluation.quality.scoring import fill, prefill
from kvcluster.evaluation.report import Claim, Line, Section
from kvcluster.evaluation.statistics import ratios
from kvcluster.evaluation.texts import built_in_text, encode, opening, span
from kvcluster.evaluation.timing import seconds_in_turn
from kvcluster.fast.huggingface import RecallCache
from kvcluster.fast.huggingface.hooks import MODEL_TYPES
from kvcluster.fast.recall_cache import RecallCache as LayerCache
from kvcluster.fast.tiers import TieredRecallCache

__all__ = ["LONG", "time_long"]

MODEL, LONG = "gemma3-270m", 32_000
BUDGETS = (1_024, 2_048)
SHAPE = (1, 4, 256)  # KV heads, queries of each, features
MOST_STEP, MOST_INDEX, MOST_WARM = 1 / 6, 0.04, 1.3
DROPPED = "two tiers, no page of the file stays in memory"
LIBC, PAGE_OUT = ctypes.CDLL(None), 21  # MADV_PAGEOUT of Linux
Bar = Callable[[str, int], Callable[[], object]]  # a progress bar from its name and steps


@torch.inference_mode()
def time_long(rounds: int, n_new: int, bar: Bar) -> list[Section]:
    """Sections: attention of a step for each budget, the index beside the prefill, and steps of the model."""
    rules: dict[str, Any] = {"shape": SHAPE, "most": MOST_STEP, "with_query_heads": True}
    steps = [time_step(LONG, budget, rounds, bar(f"step, {budget}", 5 * (rounds + 1)), **rules) for budget in BUDGETS]
    model, tokenizer = load_model(MODEL, MODEL_TYPES)
    start = opening(tokenizer)
    tokens = start + span(encode(tokenizer, built_in_text()), "reporting", 0, LONG - len(start))
    advance = bar("prefill of 32,000 tokens", 1)
    begun = time.perf_counter()
    full = prefill(model, lambda model: None, tokens)
    seconds = {"prefill": [time.perf_counter() - begun], "index": []}
    advance()
    layers = [layer for layer in full.layers if not layer.is_sliding]
    advance = bar("index", 3)
    for _ in range(3):
        begun = time.perf_counter()
        for layer in layers:
            LayerCache(budget=BUDGETS[0]).append(layer.keys, layer.values)
        seconds["index"].append(time.perf_counter() - begun)
        advance()
    index = index_section("Gemma 3 270M", LONG, len(layers), seconds, MOST_INDEX)
    return [*steps, index, time_model(model, full, tokens[-1], n_new, bar)]


def time_model(model: Any, full: Any, last: int, n_new: int, bar: Bar) -> Section:
    """Greedy generation after the context, one step of each cache in turn; all of recall give the same tokens."""
    budget = BUDGETS[0]
    options: dict[str, dict[str, Any]] = {
        "in memory": {},
        "two tiers, the file in memory": {"offloading": True},
        DROPPED: {"offloading": True},
    }
    caches = {name: fill(RecallCache.for_model(model, budget=budget, **of), full) for name, of in options.items()}
    caches = {"full cache": copy.deepcopy(full), **caches}
    next_tokens = dict.fromkeys(caches, torch.tensor([[last]]))
    clock = Clock()
    os.sync()  # pages that are not on the disk cannot be dropped

    def step(name: str) -> Callable[[], None]:
        def run() -> None:
            with dropping(clock) if name == DROPPED else nullcontext():
                logits = model(next_tokens[name], past_key_values=caches[name]).logits
            next_tokens[name] = logits[:, -1:].argmax(dim=-1)

        return run

    advance = bar("steps of the model", len(caches) * (n_new + 1))
    seconds = seconds_in_turn({name: step(name) for name in caches}, n_new, advance, clock)
    if len({int(token) for name, token in next_tokens.items() if name != "full cache"}) != 1:
        raise RuntimeError("the tiers must generate the tokens of memory, got other ones")
    lines = []
    for name, times in seconds.items():
        ratio = ratios(times, seconds["in memory"])
        claim = None
        if name == "two tiers, the file in memory":
            claim = Claim("time of a step with a warm fast tier over one tier", ratio.median, MOST_WARM)
        hits = getattr(caches[name], "statistics", None)
        lines.append(Line((name, "" if hits is None else f"{hits.hit_rate:.0%}", str(ratio)), claim))
    return Section(
        f"Steps of Gemma 3 270M after {LONG:,} tokens, budget {budget:,}, {n_new} of each in turn",
        ("keys and values", "clusters there already", "time / in memory"),
        lines,
        "The whole model's step: three of its 18 layers attend to everything. After each layer's step all pages of its "
        "file are dropped, where it says so, which is not counted.",
        {"seconds": seconds},
    )


class Clock:
    """Seconds so far, without those that were spent on `outside`."""

    def __init__(self) -> None:
        self.outside = 0.0

    def __call__(self) -> float:
        return time.perf_counter() - self.outside


@contextmanager
def dropping(clock: Clock) -> Iterator[None]:
    """After each layer's step its file has no page in memory."""
    right = TieredRecallCache.attend

    def attend_and_drop(cache: TieredRecallCache, query: Tensor, *, scale: float | None = None) -> Tensor:
        output = right(cache, query, scale=scale)
        begun = time.perf_counter()
        for tensor in cache.stored:
            storage = tensor.untyped_storage()
            LIBC.madvise(ctypes.c_void_p(storage.data_ptr()), ctypes.c_size_t(storage.nbytes()), PAGE_OUT)
        clock.outside += time.perf_counter() - begun
        return output

    TieredRecallCache.attend = attend_and_drop
    try:
        yield
    finally:
        TieredRecallCache.attend = right
