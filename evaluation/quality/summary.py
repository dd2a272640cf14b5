"""From runs to numbers with their uncertainty, one summary for each method, share of entries kept and setting.

Intervals are those of `evaluation.statistics`: from resampling whole contexts, except Wilson's for shares of needles or
prompts that are entirely right.
"""

from typing import Any

import numpy as np

from ..runs import condense, total
from ..statistics import estimate, exp_ratio_of_sums, proportion

__all__ = ["summarize"]


def summarize(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Summaries in the order of the first results, each over all contexts of its method, `keep` and setting.

    They are ready for JSON. Results may be condensed or not, and of both settings; `is_question_first` tells. Ratios
    are to the full cache on the same cases in the same setting; there are none if it did not run on all of them.
    """
    grouped: dict[tuple[str, float, bool], list[dict[str, Any]]] = {}
    for run in map(condense, results):
        setting = is_question_first(run)
        grouped.setdefault((run["key"]["method"], run["key"]["keep"], setting), []).append(run)
    summaries = []
    for (method, keep, setting), group in grouped.items():
        full = {run["key"]["case"]: run for run in grouped.get(("full", 1.0, setting), [])}
        summaries.append({"method": method, "keep": keep, "is_question_first": setting, **summary_of(group, full)})
    return summaries


def is_question_first(run: dict[str, Any]) -> bool:
    """The setting of a run; those of question later do not name theirs."""
    setting: bool = run["key"].get("is_question_first", False)
    return setting


def summary_of(group: list[dict[str, Any]], full: dict[str, dict[str, Any]]) -> dict[str, Any]:
    has_full = all(run["key"]["case"] in full for run in group)
    peers = [full[run["key"]["case"]] for run in group] if has_full else []
    n_tokens = sum(run.get("n_prompt", run["n_tokens"]) * run["stored"]["layers"] for run in group)
    summary: dict[str, Any] = {
        "n_contexts": len(group),
        "entries": sum(run["stored"]["entries"] for run in group) / n_tokens,
        "bytes": sum(run["nbytes"] for run in group) / sum(p["nbytes"] for p in peers) if peers else None,
        "of_bfloat16": of_bfloat16(group, peers),
        "seconds": {
            part: float(np.median([run["seconds"][part] for run in group])) for part in ("clustering", "asking")
        },
    }
    if with_needles := pairs_with(group, peers, "needles"):
        summary["needles"] = needle_summary(with_needles)
    if with_text := pairs_with(group, peers, "following"):
        summary["perplexity"] = perplexity_summary(with_text)
    errors = [run["attention_errors"] for run in group if "attention_errors" in run]
    if errors:
        summary["attention_errors"] = np.mean(errors, axis=0).tolist()
    if with_prompts := [run for run in group if "prompts" in run]:
        summary["tasks"] = {
            task: prompt_summary([run for run in with_prompts if run["task"] == task])
            for task in dict.fromkeys(run["task"] for run in with_prompts)
        }
    return summary


def of_bfloat16(group: list[dict[str, Any]], peers: list[dict[str, Any]]) -> float | None:
    """Bytes over those of a full cache in bfloat16; None where they were not measured, in older runs."""
    if not peers or any("nbytes_bfloat16" not in run for run in (*group, *peers)):
        return None
    share: float = sum(run["nbytes_bfloat16"] for run in group) / sum(run["nbytes_bfloat16"] for run in peers)
    return share


Pairs = list[tuple[dict[str, Any], dict[str, Any] | None]]  # a result and that of the full cache


def pairs_with(group: list[dict[str, Any]], peers: list[dict[str, Any]], name: str) -> Pairs:
    padded: list[dict[str, Any] | None] = [*peers] or [None] * len(group)
    return [(run, peer) for run, peer in zip(group, padded, strict=True) if name in run]


def needle_summary(pairs: Pairs) -> dict[str, Any]:
    of_context = [total(run["needles"]["kinds"].values()) for run, _ in pairs]
    of_full = [0 if peer is None else total(peer["needles"]["kinds"].values())["right"] for _, peer in pairs]
    sums, n_tokens, right = total(of_context), column(of_context, "tokens"), column(of_context, "right")
    kinds = list(dict.fromkeys(kind for run, _ in pairs for kind in run["needles"]["kinds"]))
    return {
        "n": sums["n"],
        "token_accuracy": estimate(right, n_tokens),
        "of_full": estimate(right, of_full),
        "exact": proportion(sums["exact"], sums["n"]),
        "exact_by_context": estimate(column(of_context, "exact"), column(of_context, "n")),
        "nll": estimate(column(of_context, "nll"), n_tokens),
        "by_kind": {
            kind: means(total(run["needles"]["kinds"][kind] for run, _ in pairs if kind in run["needles"]["kinds"]))
            for kind in kinds
        },
    }


def column(sums: list[dict[str, Any]], name: str) -> list[float]:
    return [of_context[name] for of_context in sums]


def means(sums: dict[str, Any]) -> dict[str, Any]:
    """Token accuracy, share that is exact, nats a token; without intervals."""
    return {
        "n": sums["n"],
        "token_accuracy": sums["right"] / sums["tokens"],
        "exact": sums["exact"] / sums["n"],
        "nll": sums["nll"] / sums["tokens"],
    }


def perplexity_summary(pairs: Pairs) -> dict[str, Any]:
    n = [run["following"]["n"] for run, _ in pairs]
    nll = [run["following"]["nll"] for run, _ in pairs]
    differences = [a - (peer["following"]["nll"] if peer else 0.0) for a, (_, peer) in zip(nll, pairs, strict=True)]
    has_full = all(peer is not None for _, peer in pairs)
    return {
        "n_tokens": sum(n),
        "value": estimate(nll, n, exp_ratio_of_sums),
        "of_full": estimate(differences, n if has_full else [0.0] * len(n), exp_ratio_of_sums),
    }


def prompt_summary(group: list[dict[str, Any]]) -> dict[str, Any]:
    prompts = [prompt for run in group for prompt in run["prompts"]]
    scores = [float(sum(prompt["score"] for prompt in run["prompts"])) for run in group]
    return {
        "n": len(prompts),
        "metric": prompts[0]["metric"],
        "score": estimate(scores, [float(len(run["prompts"])) for run in group]),
        "entirely_right": proportion(sum(prompt["score"] >= 1 for prompt in prompts), len(prompts)),
    }
