"""A real model: what clustering its whole cache costs beside the prefill that filled it, and how often keys are close.

SmolLM2-135M on the Python language reference, as in `kvcluster demo`.
"""

import statistics
from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache

from benchmarks.matching.contenders import CHUNK_SIZE, KEEP_RATIO, TARGET
from benchmarks.matching.costs import share_line
from kvcluster.evaluation.models import load_model
from kvcluster.evaluation.report import Claim, Line, Section
from kvcluster.evaluation.statistics import ratios
from kvcluster.evaluation.texts import load_tokens
from kvcluster.evaluation.timing import seconds_in_turn
from kvcluster.fast import SoftMatching
from kvcluster.fast.huggingface import ClusteredCache

__all__ = ["prefill_share", "prefilled", "smollm2_canonical_share"]

MOST_SHARE = 0.015
N_SINK = 4


@torch.inference_mode()
def prefill(model: Any, tokens: torch.Tensor) -> DynamicCache:
    """The full cache after one forward pass over all tokens; logits of the last one only, as `generate` asks."""
    cache = DynamicCache(config=model.config)
    model(tokens, past_key_values=cache, logits_to_keep=1)
    return cache


@torch.inference_mode()
def cluster(model: Any, full: DynamicCache) -> ClusteredCache:
    """Every layer's keys and values in a clustered cache."""
    cache = ClusteredCache.for_model(
        model, keep_ratio=KEEP_RATIO, chunk_size=CHUNK_SIZE, n_sink=N_SINK, n_recent=64, method=SoftMatching()
    )
    for ours, theirs in zip(cache.layers, full.layers, strict=True):
        ours.cache.extend(theirs.keys, theirs.values)
        ours.cache.cluster()
    return cache


def prefilled(n_tokens: int) -> tuple[Any, torch.Tensor, DynamicCache]:
    """Model, tokens (1, n_tokens) and the full cache after them."""
    model, tokenizer = load_model(None)
    tokens = load_tokens(None, tokenizer, n_tokens)
    return model, tokens, prefill(model, tokens)


def prefill_share(
    model: Any, tokens: torch.Tensor, full: DynamicCache, rounds: int, advance: Callable[[], object]
) -> Section:
    """Seconds of prefill and of clustering, in turn."""
    runs = {"prefill": lambda: prefill(model, tokens), "cluster": lambda: cluster(model, full)}
    seconds = seconds_in_turn(runs, rounds, advance)
    share = ratios(seconds["cluster"], seconds["prefill"])
    claim = Claim("share of the prefill", share.median, MOST_SHARE)
    prefill_time, cluster_time = (f"{statistics.median(seconds[name]):.3f} s" for name in ("prefill", "cluster"))
    spread = f"{share.median:.2%} ({share.low:.2%} to {share.high:.2%})"
    layers = len(full.layers)
    return Section(
        f"5. SmolLM2-135M, float32: {tokens.shape[1]:,} tokens in one forward, then {layers} layers' keys and values"
        f" clustered at keep {KEEP_RATIO}",
        ("what", "median", "share of the prefill"),
        [
            Line(("prefill", prefill_time, "100 %")),
            Line(("cluster every layer", cluster_time, spread), claim, "{:.1%}"),
        ],
        f"Median (least to largest) of the shares within each of {rounds} turns.",
        {"seconds": seconds},
    )


def smollm2_canonical_share(full: DynamicCache) -> Line:
    """Share of rows that the float32 filter left open on the keys of all layers, as a line of table 4."""
    scored = rows = 0
    for layer in full.layers:
        body = (layer.keys.shape[-2] - N_SINK) // CHUNK_SIZE * CHUNK_SIZE
        keys = layer.keys[..., N_SINK : N_SINK + body, :]
        compressed = SoftMatching().compress(keys, None, chunk_size=CHUNK_SIZE, target=TARGET)
        scored, rows = scored + compressed.n_scored_rows, rows + compressed.n_rows
    return share_line(f"SmolLM2's keys, {len(full.layers)} layers, {keys.shape[-1]} dims", scored, rows)
