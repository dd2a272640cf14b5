"""The demo itself: prefill once, cluster, generate in turn from both caches, let the reference check, draw."""

import copy
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers import DynamicCache

from kvcluster.fast import SoftMatching
from kvcluster.fast.huggingface import ClusteredCache
from kvcluster.fast.huggingface.hooks import MODEL_TYPES
from kvcluster.reference.arguments import check_integer, check_keep_ratio

from ..errors import UnusableInputError
from ..layers import full_layers
from ..models import load_model
from ..quality.scoring import fill
from ..texts import load_tokens, read_text
from .figure import check_figure_path, draw
from .oracle import check_against_reference, next_token_attention

__all__ = ["Measured", "measure", "run_demo"]

N_NEXT = 512  # tokens after the context whose perplexity is measured
N_FED = 16  # of these, tokens fed at once
N_GENERATED = 48
N_CONTEXT_LEAST = 64
STEP = 512  # tokens of prefill between two movements of the progress bar
BARS = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())


@dataclass
class Measured:
    """A cache of the context, and the numbers by which it is judged."""

    cache: Any
    entries: int
    nbytes: int
    perplexity: float
    continuation: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def run_demo(
    model_folder: str | Path | None,
    text_path: Path | None,
    *,
    keep_ratio: float,
    chunk_size: int,
    n_context: int,
    figure_path: Path,
) -> bool:
    """Run, print and draw everything; whether the reference confirmed every decision and every output."""
    check_arguments(keep_ratio, chunk_size, n_context, figure_path)
    text = None if text_path is None else read_text(text_path)
    console = Console()
    with console.status("Loading the model (the first time, one from a package is converted: up to a minute)"):
        model, tokenizer = load_model(model_folder, MODEL_TYPES)
        check_layers(model)
        check_length(n_context, model.config.max_position_embeddings)
        context, following = load_tokens(text, tokenizer, n_context + N_NEXT).split([n_context, N_NEXT], dim=1)
    with Progress(*BARS, console=console) as progress, torch.inference_mode():
        full, clustered = measure(
            model, context, following, keep_ratio=keep_ratio, chunk_size=chunk_size, progress=progress
        )
        next_token = torch.tensor([full.continuation[:1]])
        attention = next_token_attention(model, full.cache, clustered.cache, next_token)
        verdict = check_against_reference(full.cache, clustered.cache, attention, progress)
    console.print(table(full, clustered, tokenizer, n_context))
    console.print(verdict.line, style="green" if verdict.agrees else "bold red", highlight=False)
    if any(labels.size for labels in verdict.labels.values()):
        words = [tokenizer.decode([token]) for token in context[0].tolist()]
        draw(figure_path, clustered.cache, attention, verdict.labels, words)
        console.print(f"Figure: {escape(str(figure_path))}", highlight=False, soft_wrap=True)
    else:
        console.print(
            "No figure: the context is shorter than sinks, one chunk and recent tokens, so nothing was clustered"
        )
    return verdict.agrees


def check_arguments(keep_ratio: float, chunk_size: int, n_context: int, figure_path: Path) -> None:
    """Refuse what can be refused before a model is loaded."""
    try:
        check_keep_ratio(keep_ratio)
        check_integer("chunk_size", chunk_size, least=1)
        check_integer("tokens", n_context, least=N_CONTEXT_LEAST)
        check_figure_path(figure_path)
    except ValueError as error:
        raise UnusableInputError(str(error)) from error


def check_layers(model: Any) -> None:
    """Refuse a model of which nothing would be clustered."""
    try:
        full_layers(model)
    except ValueError as error:
        raise UnusableInputError(str(error)) from error


def check_length(n_context: int, n_positions: int) -> None:
    """Refuse a context that, with what follows, is too long for a model of `n_positions`."""
    if n_positions < N_CONTEXT_LEAST + N_NEXT:
        raise UnusableInputError(
            f"model must know at least {N_CONTEXT_LEAST + N_NEXT} positions (max_position_embeddings), "
            f"got one that knows {n_positions}"
        )
    if n_context + N_NEXT > n_positions:
        raise UnusableInputError(f"tokens must be at most {n_positions - N_NEXT} for this model, got {n_context}")


def measure(
    model: Any,
    context: torch.Tensor,
    following: torch.Tensor,
    *,
    keep_ratio: float,
    chunk_size: int,
    progress: Progress,
) -> tuple[Measured, Measured]:
    """The full and the clustered cache of `context` (1, tokens), each with the numbers by which it is judged."""
    full, first = prefill(model, context, progress)
    clustered = ClusteredCache.for_model(
        model, keep_ratio=keep_ratio, method=SoftMatching(), chunk_size=chunk_size, n_sink=16, n_recent=64
    )
    task = progress.add_task("Cluster, layer by layer", total=len(full.layers))
    fill(clustered, full, on_layer=lambda: progress.advance(task))
    results = (
        Measured(full, full.get_seq_length(), cache_bytes(full), perplexity(model, full, first, following, progress)),
        Measured(
            clustered,
            clustered.n_stored,
            clustered.nbytes_reserved,
            perplexity(model, clustered, first, following, progress),
        ),
    )
    generate_in_turn(model, int(first.argmax()), results, progress)
    return results


def prefill(model: Any, context: torch.Tensor, progress: Progress) -> tuple[DynamicCache, torch.Tensor]:
    """The full cache of `context` (1, tokens) and the logits (vocabulary,) of what comes next."""
    full = DynamicCache(config=model.config)
    task = progress.add_task("Prefill (tokens)", total=context.shape[1])
    for part in context.split(STEP, dim=1):
        logits = model(part, past_key_values=full, logits_to_keep=1).logits
        progress.advance(task, part.shape[1])
    return full, logits[0, -1]


def cache_bytes(cache: DynamicCache) -> int:
    """Bytes of the memory behind the tensors of a transformers cache."""
    return sum(x.untyped_storage().nbytes() for layer in cache.layers for x in (layer.keys, layer.values))


def perplexity(model: Any, cache: Any, first: torch.Tensor, following: torch.Tensor, progress: Progress) -> float:
    """Perplexity of `following` (1, tokens) after the context in `cache`, which is left as it is.

    `first` (vocabulary,) are the logits after the context. The tokens are fed `N_FED` at a time, so that a clustered
    cache goes on clustering while it is measured, nearly as when it generates.
    """
    cache = copy.deepcopy(cache)
    logits = [first[None]]
    steps = following[:, :-1].split(N_FED, dim=1)
    for part in progress.track(steps, description=f"Perplexity, {N_FED} tokens a step"):
        logits.append(model(part, past_key_values=cache).logits[0])
    return math.exp(torch.nn.functional.cross_entropy(torch.cat(logits).float(), following[0]))


def generate_in_turn(model: Any, first_token: int, results: Sequence[Measured], progress: Progress) -> None:
    """Greedy continuations from copies of the caches, one token each in turn, so that all meet the same machine."""
    caches = [copy.deepcopy(result.cache) for result in results]
    for result in results:
        result.continuation.append(first_token)
    for _ in progress.track(range(N_GENERATED - 1), description="Generate, both in turn"):
        for result, cache in zip(results, caches, strict=True):
            last = torch.tensor([result.continuation[-1:]])
            start = time.perf_counter()
            token = int(model(last, past_key_values=cache).logits[0, -1].argmax())
            result.seconds.append(time.perf_counter() - start)
            result.continuation.append(token)


def table(full: Measured, clustered: Measured, tokenizer: Any, n_context: int) -> Table:
    """Full and clustered cache side by side."""
    ratios = sorted(a / b for a, b in zip(clustered.seconds, full.seconds, strict=True))
    low, high = ratios[len(ratios) // 10], ratios[-1 - len(ratios) // 10]
    comparison = Table(title=f"The same {n_context:,} tokens in two caches", show_lines=True)
    comparison.add_column("")
    for column in ("full", "clustered"):
        comparison.add_column(column, ratio=2)
    comparison.add_column("clustered / full")
    comparison.add_row(
        "entries per head", f"{full.entries:,}", f"{clustered.entries:,}", f"{clustered.entries / full.entries:.3f}"
    )
    comparison.add_row(
        "bytes of the cache", f"{full.nbytes:,}", f"{clustered.nbytes:,}", f"{clustered.nbytes / full.nbytes:.3f}"
    )
    comparison.add_row(
        "ms per token (median)",
        *(f"{1000 * statistics.median(result.seconds):.1f}" for result in (full, clustered)),
        f"{statistics.median(ratios):.2f} ({low:.2f} to {high:.2f})",
    )
    comparison.add_row(
        f"perplexity of the next {N_NEXT}",
        f"{full.perplexity:.2f}",
        f"{clustered.perplexity:.2f}",
        f"{clustered.perplexity / full.perplexity:.3f}",
    )
    comparison.add_row(
        "continuation", *(tokenizer.decode(result.continuation).strip() for result in (full, clustered)), ""
    )
    return comparison
