"""The demo itself: prefill once, cluster, generate in turn from both caches, let the reference check, draw."""

import copy
import math
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from kvcluster.fast.huggingface import ClusteredCache
from kvcluster.reference.arguments import check_integer, check_keep_ratio
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers import DynamicCache

from .figure import draw
from .inputs import UnusableInputError, load_model, load_tokens
from .oracle import check_against_reference, next_token_attention

__all__ = ["run_demo"]

N_NEXT = 512  # tokens after the context whose perplexity is measured
N_GENERATED = 48
STEP = 512  # tokens of prefill between two movements of the progress bar


@dataclass
class Measured:
    """What one cache is judged by."""

    entries: int
    nbytes: int
    perplexity: float
    continuation: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def run_demo(
    model_folder: Path | None,
    text: Path | None,
    *,
    keep_ratio: float,
    chunk_size: int,
    n_context: int,
    figure_path: Path,
) -> bool:
    """Run, print and draw everything; whether the reference confirmed every decision and every output."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    console = Console()
    try:
        check_keep_ratio(keep_ratio)
        check_integer("chunk_size", chunk_size, least=1)
        check_integer("tokens", n_context, least=64)
    except ValueError as error:
        raise UnusableInputError(str(error)) from error
    with console.status("Loading the model (the first time, SmolLM2 is converted: about 25 s)"):
        model, tokenizer = load_model(model_folder)
        tokens = load_tokens(text, tokenizer, n_context + N_NEXT)
    if tokens.shape[1] > model.config.max_position_embeddings:
        raise UnusableInputError(
            f"tokens must be at most {model.config.max_position_embeddings - N_NEXT} for this model, got {n_context}"
        )
    if not figure_path.parent.is_dir():
        raise UnusableInputError(f"figure must lie in an existing folder, got {figure_path}")
    context, following = tokens[:, :n_context], tokens[:, n_context:]

    bars = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*bars, console=console) as progress, torch.inference_mode():
        full, first_token = prefill(model, context, progress)
        clustered = ClusteredCache.for_model(model, keep_ratio=keep_ratio, chunk_size=chunk_size)
        for index, layer in enumerate(progress.track(full.layers, description="Cluster, layer by layer")):
            clustered.update(layer.keys, layer.values, index)
        results = {
            "full": Measured(full.get_seq_length(), cache_bytes(full), perplexity(model, full, first_token, following)),
            "clustered": Measured(
                clustered.n_stored, clustered.nbytes, perplexity(model, clustered, first_token, following)
            ),
        }
        caches = {"full": full, "clustered": clustered}
        generate_in_turn(model, caches, int(first_token.argmax()), results, progress)
        attention = next_token_attention(model, full, clustered, first_token.argmax().reshape(1, 1))
        verdict = check_against_reference(full, clustered, attention, progress)

    console.print(table(results, tokenizer, n_context))
    console.print(verdict.line, style="green" if verdict.agrees else "bold red", highlight=False)
    if verdict.labels[0].size == 0:
        console.print(
            "No figure: the context is shorter than sinks, one chunk and recent tokens, so nothing was clustered"
        )
        return verdict.agrees
    words = [tokenizer.decode([token]) for token in context[0].tolist()]
    draw(figure_path, clustered, attention, verdict.labels, words)
    console.print(f"Figure: {figure_path}", highlight=False, soft_wrap=True)
    return verdict.agrees


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


def perplexity(model: Any, cache: Any, first: torch.Tensor, following: torch.Tensor) -> float:
    """Perplexity of `following` (1, tokens) after the context in `cache`, which is left as it is."""
    logits = model(following[:, :-1], past_key_values=copy.deepcopy(cache)).logits[0]
    logits = torch.cat([first[None], logits])  # (tokens, vocabulary)
    return math.exp(torch.nn.functional.cross_entropy(logits.float(), following[0]))


def generate_in_turn(
    model: Any, caches: dict[str, Any], first_token: int, results: dict[str, Measured], progress: Progress
) -> None:
    """Greedy continuations from copies of both caches, one token each in turn, so that both meet the same machine."""
    caches = {name: copy.deepcopy(cache) for name, cache in caches.items()}
    for result in results.values():
        result.continuation.append(first_token)
    for _ in progress.track(range(N_GENERATED - 1), description="Generate, both in turn"):
        for name, cache in caches.items():
            last = torch.tensor([results[name].continuation[-1:]])
            start = time.perf_counter()
            token = int(model(last, past_key_values=cache).logits[0, -1].argmax())
            results[name].seconds.append(time.perf_counter() - start)
            results[name].continuation.append(token)


def table(results: dict[str, Measured], tokenizer: Any, n_context: int) -> Table:
    """Full and clustered cache side by side."""
    full, clustered = results["full"], results["clustered"]
    ratios = sorted(a / b for a, b in zip(clustered.seconds, full.seconds, strict=True))
    low, high = ratios[len(ratios) // 10], ratios[-1 - len(ratios) // 10]
    made = Table(title=f"The same {n_context:,} tokens in two caches", show_lines=True)
    made.add_column("")
    for column in ("full", "clustered"):
        made.add_column(column, ratio=2)
    made.add_column("clustered / full")
    made.add_row(
        "entries per head", f"{full.entries:,}", f"{clustered.entries:,}", f"{clustered.entries / full.entries:.3f}"
    )
    made.add_row(
        "bytes of the cache", f"{full.nbytes:,}", f"{clustered.nbytes:,}", f"{clustered.nbytes / full.nbytes:.3f}"
    )
    made.add_row(
        "ms per token (median)",
        *(f"{1000 * statistics.median(result.seconds):.1f}" for result in (full, clustered)),
        f"{statistics.median(ratios):.2f} ({low:.2f} to {high:.2f})",
    )
    made.add_row(
        f"perplexity of the next {N_NEXT}",
        f"{full.perplexity:.2f}",
        f"{clustered.perplexity:.2f}",
        f"{clustered.perplexity / full.perplexity:.3f}",
    )
    made.add_row("continuation", *(tokenizer.decode(result.continuation).strip() for result in (full, clustered)), "")
    return made
