"""A whole model decoding: SmolLM2's weights, caches of every kind, in turn; then from the prompt to the last token."""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ..machine import read_all
from ..report import Claim, Line, Section
from ..statistics import Ratios, ratios
from ..timing import seconds_in_turn
from .contenders import CONTENDERS, IN_FEW_BITS, filled, stored_bytes

__all__ = ["decoding", "end_to_end", "step"]

# Of the largest context and batch at keep_ratio 0.2; the second is Chelsea's claim for a cache reduced by 80 %
# (arXiv:2506.11418v1), made on a GPU.
LEAST_OVER_TRANSFORMERS, LEAST_OVER_FULL, LEAST_OF_LIMIT = 5.0, 3.19, 0.85
BEST = "clustered 0.2"
LEAST_IN_FEW_BITS = {"clustered 0.25": 1.6, "full": 5.0}  # over the same entries as they are, and over our full cache


@torch.inference_mode()
def decoding(
    model: Any, contexts: tuple[int, ...], batches: tuple[int, ...], rounds: int, advance: Callable[[], object]
) -> Section:
    """Seconds of one decoding step after `contexts` random tokens: their values do not affect the time."""
    weights = list(model.parameters())
    weight_bytes = sum(parameter.nbytes for parameter in weights)
    lines: list[Line] = []
    numbers: list[dict[str, Any]] = []
    for batch in batches:
        for context in contexts:
            caches = {name: filled(make(model), batch, context, model) for name, make in CONTENDERS.items()}
            n_bytes = {name: weight_bytes + stored_bytes(cache) for name, cache in caches.items()}
            token = torch.ones(batch, 1, dtype=torch.long)
            runs = {name: step(model, token, cache) for name, cache in caches.items()}
            tensors = [x for layer in caches["full"].layers for x in (layer.keys, layer.values)]
            runs["read"] = partial(read_all, weights + tensors)
            seconds = seconds_in_turn(runs, rounds, advance)
            bandwidth = n_bytes["full"] / statistics.median(seconds["read"])
            limits = {name: n_bytes[name] / bandwidth for name in caches}
            numbers.append({"batch": batch, "context": context, "seconds": seconds, "limits": limits})
            is_last = batch == max(batches) and context == max(contexts)
            lines += lines_of(batch, context, seconds, limits, is_last)
    return Section(
        "2. A step of a whole model (SmolLM2-135M, float32)",
        ("cache, tokens x batch", "ms per step", "byte limit, ms", "transformers / this", "full (ours) / this"),
        lines,
        "Byte limit: weights and stored entries over the read bandwidth of a plain sum over the same tensors in the "
        "same turns. Contexts beyond the 8,192 positions of the training are fine for timing only.",
        {"runs": numbers},
    )


def step(model: Any, token: torch.Tensor, cache: Any) -> Callable[[], object]:
    return lambda: model(token, past_key_values=cache)


def lines_of(
    batch: int, context: int, seconds: dict[str, list[float]], limits: dict[str, float], is_last: bool
) -> list[Line]:
    lines = []
    for name, limit in limits.items():
        over_default, over_full = (ratios(seconds[other], seconds[name]) for other in ("transformers", "full"))
        cells = (
            f"{name}, {context:,} x {batch}",
            f"{1e3 * statistics.median(seconds[name]):.1f}",
            f"{1e3 * limit:.1f}",
            str(over_default),
            str(over_full),
        )
        lines.append(Line(cells))
        if name == BEST and is_last:
            allowed = limits["full"] / limit
            lines += targets(over_default, over_full, allowed)
        if name == IN_FEW_BITS and is_last:
            for other, least in LEAST_IN_FEW_BITS.items():
                measured = ratios(seconds[other], seconds[name]).median
                claim = Claim(f"{name} over {other}", measured, least, is_least=True)
                lines.append(Line((f"  over {other}", "", "", f"{measured:.2f}", ""), claim, "{:.2f}"))
    return lines


def targets(over_default: Ratios, over_full: Ratios, allowed: float) -> list[Line]:
    """What the largest problem must show."""

    def line(what: str, measured: float, target: float) -> Line:
        return Line(
            (f"  {what}", "", "", f"{measured:.2f}", ""), Claim(what, measured, target, is_least=True), "{:.2f}"
        )

    return [
        line("over transformers", over_default.median, LEAST_OVER_TRANSFORMERS),
        line("over our full cache", over_full.median, LEAST_OVER_FULL),
        line(f"of the byte limit's {allowed:.2f}", over_full.median / allowed, LEAST_OF_LIMIT),
    ]


@torch.inference_mode()
def end_to_end(model: Any, prompt: torch.Tensor, n_new: int, rounds: int, advance: Callable[[], object]) -> Section:
    """Prefill, compression and `n_new` tokens."""
    parts: dict[str, list[tuple[float, float]]] = {name: [] for name in CONTENDERS}

    def run(name: str) -> None:
        cache = CONTENDERS[name](model)
        start = time.perf_counter()
        token = model(prompt, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)
        middle = time.perf_counter()
        for _ in range(n_new):
            token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
        parts[name].append((middle - start, time.perf_counter() - middle))

    for _ in range(rounds):
        for name in CONTENDERS:
            run(name)
            advance()
    totals = {name: [sum(part) for part in turns] for name, turns in parts.items()}
    lines = []
    for name, turns in parts.items():
        speedup = ratios(totals["full"], totals[name])
        prompt_time, new_tokens = (f"{statistics.median(part[i] for part in turns):.1f}" for i in range(2))
        cells = (name, prompt_time, new_tokens, str(ratios(totals["transformers"], totals[name])), str(speedup))
        claim = Claim(f"end to end, {name}", speedup.median, 1.0, is_least=True) if "clustered" in name else None
        lines.append(Line(cells, claim))
    return Section(
        f"3. From a prompt of {prompt.shape[1]:,} tokens to {n_new} new ones, batch {len(prompt)}",
        ("cache", "prompt, s", "new tokens, s", "transformers / this", "full (ours) / this"),
        lines,
        "The prompt's time includes the compression.",
        {"seconds": parts},
    )
