"""Which chunk size and how many sinks chunked soft matching needs, at equal entries: what its defaults come from."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from rich.progress import Progress

from kvcluster.evaluation.pages import table
from kvcluster.evaluation.quality import needle_cases
from kvcluster.evaluation.quality.cases import Case
from kvcluster.evaluation.quality.measuring import of_needle
from kvcluster.evaluation.quality.methods import body_entries
from kvcluster.evaluation.quality.reading import Context
from kvcluster.evaluation.quality.scoring import copy_rows, fill, following_nll, score_answers, score_needles
from kvcluster.evaluation.report import with_interval
from kvcluster.evaluation.runs import Runs, needle_sums
from kvcluster.evaluation.statistics import estimate, exp_ratio_of_sums
from kvcluster.evaluation.texts import built_in_text, encode
from kvcluster.fast import SoftMatching
from kvcluster.fast.huggingface import ClusteredCache
from kvcluster.fast.huggingface.fingerprints import weights_digest
from kvcluster.fast.huggingface.head_pairs import HeadPairs

__all__ = ["HEAD", "constants_table", "measure", "measure_constants", "over_full", "soft_matching"]

CHUNKS, SINKS, N_RECENT = (16, 64, 256), (4, 16), 64
KEEPS = (0.5, 0.25)
FULL = "full"
HEAD = ["entries", "needles, first", "needles, later", "perplexity"]


def measure_constants(model: Any, tokenizer: Any, runs: Runs, *, n_contexts: int, n_tokens: int) -> None:
    """Add what is missing: needles in both settings, and perplexity, on contexts of the tuning half of the text."""
    tokens = encode(tokenizer, built_in_text())
    cases = needle_cases(tokenizer, tokens, "tuning", lengths=[n_tokens], n_contexts=n_contexts)
    weights = weights_digest(model)
    variants = [(FULL, 1.0, 0, 0), *(("soft", k, c, s) for k in KEEPS for c in CHUNKS for s in SINKS)]
    with Progress() as progress:
        task = progress.add_task("Constants", total=len(cases) * len(variants))
        for case in cases:
            context = Context(model, case.tokens)
            for kind, keep, chunk, sinks in variants:
                key = {"part": "constants", "kind": kind, "keep": keep, "chunk": chunk, "sinks": sinks}
                key |= {"case": case.fingerprint, "model": weights}
                if runs.found(key) is None:
                    make = partial(soft_matching, model, keep, chunk, sinks) if chunk else None
                    runs.add({"key": key, **measure(model, context, case, make)})
                progress.advance(task)


def soft_matching(
    model: Any, keep: float, chunk: int, sinks: int, n_tokens: int, whole_heads: HeadPairs = ()
) -> ClusteredCache:
    """A cache that may store `keep * n_tokens` entries in each head that is not whole."""
    sizes: dict[str, Any] = {"chunk_size": chunk, "n_sink": sinks, "n_recent": N_RECENT}
    ratio = body_entries(keep, n_tokens, **sizes) / chunk
    return ClusteredCache.for_model(model, keep_ratio=ratio, method=SoftMatching(), whole_heads=whole_heads, **sizes)


@torch.inference_mode()
def measure(model: Any, context: Context, case: Case, make: Callable[[int], Any] | None) -> dict[str, Any]:
    """Sums of one context, in both settings; None makes the full cache."""

    def compressed(read: Context) -> Any:
        return read.full if make is None else fill(make(len(read.tokens)), read.full)

    later = compressed(context)
    layers = [layer for layer in later.layers if not layer.is_sliding]
    scores = score_needles(model, later, case.needles, nbytes=2 * sum(layer.keys.nbytes for layer in layers))
    first = []
    for needle in case.needles:
        asked = context.ask(needle.question)
        cache = copy_rows(asked.prompt.full) if make is None else compressed(asked.prompt)
        [score] = score_answers(model, cache, asked.logits[None], [needle.answer])
        first.append(of_needle(needle, score))
    return {
        "entries": sum(map(entries, layers)) / len(layers) / len(case.tokens),
        "later": needle_sums([x.is_right for x in scores], [x.nll for x in scores]),
        "first": needle_sums([x["is_right"] for x in first], [x["nll"] for x in first]),
        "following": {"n": len(case.following) - 1, "nll": round(sum(following_nll(model, later, case.following)), 6)},
    }


def entries(layer: Any) -> float:
    """Of a KV head of a layer, the mean of all."""
    return layer.cache.caches[0].mean_entries if hasattr(layer, "cache") else layer.keys.shape[-2]


def over_full(group: list[dict[str, Any]], full: list[dict[str, Any]]) -> list[str]:
    """Entries, needles in both settings and perplexity, over the full cache's where that is 1."""
    cells = [f"{sum(run['entries'] for run in group) / len(group):.3f}"]
    for setting in ("first", "later"):
        right = ([run[setting]["right"] for run in runs] for runs in (group, full))
        cells.append(with_interval(estimate(*right), to="-"))
    differences = [run["following"]["nll"] - whole["following"]["nll"] for run, whole in zip(group, full, strict=True)]
    perplexity = estimate(differences, [run["following"]["n"] for run in group], exp_ratio_of_sums)
    return [*cells, with_interval(perplexity, to="-")]


def constants_table(runs: list[dict[str, Any]]) -> str:
    """A row for each share kept, chunk size and number of sinks."""
    grouped: dict[tuple[float, int, int], list[dict[str, Any]]] = {}
    for run in runs:
        grouped.setdefault(tuple(run["key"][name] for name in ("keep", "chunk", "sinks")), []).append(run)  # type: ignore[arg-type]
    full = grouped.pop((1.0, 0, 0))
    rows = [
        [f"{keep:g}", str(chunk), str(sinks), *over_full(group, full)]
        for (keep, chunk, sinks), group in grouped.items()
    ]
    return table(["kept", "chunk", "sinks", *HEAD], rows)
