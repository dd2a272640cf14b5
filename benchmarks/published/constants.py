"""Which chunk size and how many sinks chunked soft matching needs, at equal entries: what its defaults come from."""

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
from kvcluster.fast.huggingface.saving import fingerprint

__all__ = ["constants_table", "measure_constants"]

CHUNKS, SINKS, N_RECENT = (16, 64, 256), (4, 16), 64
KEEPS = (0.5, 0.25)
FULL = "full"


def measure_constants(model: Any, tokenizer: Any, runs: Runs, *, n_contexts: int, n_tokens: int) -> None:
    """Add what is missing: needles in both settings, and perplexity, on contexts of the tuning half of the text."""
    tokens = encode(tokenizer, built_in_text())
    cases = needle_cases(tokenizer, tokens, "tuning", lengths=[n_tokens], n_contexts=n_contexts)
    weights = fingerprint(model)["weights"]
    variants = [(FULL, 1.0, 0, 0), *(("soft", k, c, s) for k in KEEPS for c in CHUNKS for s in SINKS)]
    with Progress() as progress:
        task = progress.add_task("Constants", total=len(cases) * len(variants))
        for case in cases:
            context = Context(model, case.tokens)
            for kind, keep, chunk, sinks in variants:
                key = {"part": "constants", "kind": kind, "keep": keep, "chunk": chunk, "sinks": sinks}
                key |= {"case": case.fingerprint, "model": weights}
                if runs.found(key) is None:
                    runs.add({"key": key, **measure(model, context, case, keep, chunk, sinks)})
                progress.advance(task)


@torch.inference_mode()
def measure(model: Any, context: Context, case: Case, keep: float, chunk: int, sinks: int) -> dict[str, Any]:
    """Sums of one context; `chunk` 0 is the full cache."""

    def compressed(read: Context) -> Any:
        if not chunk:
            return read.full
        ratio = body_entries(keep, len(read.tokens), chunk_size=chunk, n_sink=sinks, n_recent=N_RECENT) / chunk
        sizes = {"chunk_size": chunk, "n_sink": sinks, "n_recent": N_RECENT}
        return fill(ClusteredCache.for_model(model, keep_ratio=ratio, method=SoftMatching(), **sizes), read.full)

    later = compressed(context)
    scores = score_needles(model, later, case.needles, nbytes=sum(x.keys.nbytes for x in later.layers) * 2)
    first = []
    for needle in case.needles:
        asked = context.ask(needle.question)
        cache = copy_rows(asked.prompt.full) if not chunk else compressed(asked.prompt)
        [score] = score_answers(model, cache, asked.logits[None], [needle.answer])
        first.append(of_needle(needle, score))
    return {
        "entries": sum(layer.keys.shape[-2] for layer in later.layers) / len(later.layers) / len(case.tokens),
        "later": needle_sums([x.is_right for x in scores], [x.nll for x in scores]),
        "first": needle_sums([x["is_right"] for x in first], [x["nll"] for x in first]),
        "following": {"n": len(case.following) - 1, "nll": round(sum(following_nll(model, later, case.following)), 6)},
    }


def constants_table(runs: list[dict[str, Any]]) -> str:
    """A row for each share kept, chunk size and number of sinks; over the full cache's where that is 1."""
    grouped: dict[tuple[float, int, int], list[dict[str, Any]]] = {}
    for run in runs:
        grouped.setdefault(tuple(run["key"][name] for name in ("keep", "chunk", "sinks")), []).append(run)  # type: ignore[arg-type]
    full = grouped.pop((1.0, 0, 0))
    rows = []
    for (keep, chunk, sinks), group in grouped.items():
        needles = (
            estimate([run[setting]["right"] for run in group], [run[setting]["right"] for run in full])
            for setting in ("first", "later")
        )
        differences = [
            run["following"]["nll"] - whole["following"]["nll"] for run, whole in zip(group, full, strict=True)
        ]
        perplexity = estimate(differences, [run["following"]["n"] for run in group], exp_ratio_of_sums)
        entries = sum(run["entries"] for run in group) / len(group)
        cells = [f"{keep:g}", str(chunk), str(sinks), f"{entries:.3f}"]
        rows.append([*cells, *(with_interval(x, to="-") for x in (*needles, perplexity))])
    head = ["kept", "chunk", "sinks", "entries", "needles, question first", "needles, question later", "perplexity"]
    return table(head, rows)
