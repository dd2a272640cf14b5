"""From runs to numbers with their uncertainty, one summary for each method and share of entries kept.

Intervals are those of `evaluation.statistics`: from resampling whole contexts, but for shares of needles or prompts
that are entirely right, which are Wilson's.
"""

from typing import Any

import numpy as np

from ..runs import condense, total
from ..statistics import estimate, exp_ratio_of_sums, proportion

__all__ = ["summarize"]


def summarize(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Summaries in the order of the first results, each over all contexts of its method and `keep`, ready for JSON.

    Results may be condensed or not. Ratios are to the full cache on the same cases; there are none if it did not run
    on all of them.
    """
    grouped: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for each in map(condense, results):
        grouped.setdefault((each["key"]["method"], each["key"]["keep"]), []).append(each)
    full = {each["key"]["case"]: each for each in grouped.get(("full", 1.0), [])}
    return [{"method": method, "keep": keep, **summary_of(group, full)} for (method, keep), group in grouped.items()]


def summary_of(group: list[dict[str, Any]], full: dict[str, dict[str, Any]]) -> dict[str, Any]:
    has_full = all(each["key"]["case"] in full for each in group)
    peers = [full[each["key"]["case"]] for each in group] if has_full else []
    n_tokens = sum(each["n_tokens"] * each["stored"]["layers"] for each in group)
    made: dict[str, Any] = {
        "n_contexts": len(group),
        "entries": sum(each["stored"]["entries"] for each in group) / n_tokens,
        "bytes": sum(each["nbytes"] for each in group) / sum(p["nbytes"] for p in peers) if peers else None,
        "seconds": {
            part: float(np.median([each["seconds"][part] for each in group])) for part in ("clustering", "asking")
        },
    }
    if with_needles := pairs_with(group, peers, "needles"):
        made["needles"] = needle_summary(with_needles)
    if with_text := pairs_with(group, peers, "following"):
        made["perplexity"] = perplexity_summary(with_text)
    errors = [each["attention_errors"] for each in group if "attention_errors" in each]
    if errors:
        made["attention_errors"] = np.mean(errors, axis=0).tolist()
    if asked := [each for each in group if "prompts" in each]:
        made["tasks"] = {
            task: prompt_summary([each for each in asked if each["task"] == task])
            for task in dict.fromkeys(each["task"] for each in asked)
        }
    return made


Pairs = list[tuple[dict[str, Any], dict[str, Any] | None]]  # a result and that of the full cache


def pairs_with(group: list[dict[str, Any]], peers: list[dict[str, Any]], name: str) -> Pairs:
    padded: list[dict[str, Any] | None] = [*peers] or [None] * len(group)
    return [(each, peer) for each, peer in zip(group, padded, strict=True) if name in each]


def needle_summary(pairs: Pairs) -> dict[str, Any]:
    of_context = [total(each["needles"]["kinds"].values()) for each, _ in pairs]
    of_full = [0 if peer is None else total(peer["needles"]["kinds"].values())["right"] for _, peer in pairs]
    whole, n_tokens, right = total(of_context), column(of_context, "tokens"), column(of_context, "right")
    kinds = list(dict.fromkeys(kind for each, _ in pairs for kind in each["needles"]["kinds"]))
    return {
        "n": whole["n"],
        "token_accuracy": estimate(right, n_tokens),
        "of_full": estimate(right, of_full),
        "exact": proportion(whole["exact"], whole["n"]),
        "exact_by_context": estimate(column(of_context, "exact"), column(of_context, "n")),
        "nll": estimate(column(of_context, "nll"), n_tokens),
        "by_kind": {
            kind: means(total(each["needles"]["kinds"][kind] for each, _ in pairs if kind in each["needles"]["kinds"]))
            for kind in kinds
        },
    }


def column(sums: list[dict[str, Any]], name: str) -> list[float]:
    return [each[name] for each in sums]


def means(sums: dict[str, Any]) -> dict[str, Any]:
    """Token accuracy, share that is exact, nats a token; without intervals."""
    return {
        "n": sums["n"],
        "token_accuracy": sums["right"] / sums["tokens"],
        "exact": sums["exact"] / sums["n"],
        "nll": sums["nll"] / sums["tokens"],
    }


def perplexity_summary(pairs: Pairs) -> dict[str, Any]:
    n = [each["following"]["n"] for each, _ in pairs]
    nll = [each["following"]["nll"] for each, _ in pairs]
    more = [a - (peer["following"]["nll"] if peer else 0.0) for a, (_, peer) in zip(nll, pairs, strict=True)]
    has_full = all(peer is not None for _, peer in pairs)
    return {
        "n_tokens": sum(n),
        "value": estimate(nll, n, exp_ratio_of_sums),
        "of_full": estimate(more, n if has_full else [0.0] * len(n), exp_ratio_of_sums),
    }


def prompt_summary(group: list[dict[str, Any]]) -> dict[str, Any]:
    prompts = [prompt for each in group for prompt in each["prompts"]]
    scores = [float(sum(prompt["score"] for prompt in each["prompts"])) for each in group]
    return {
        "n": len(prompts),
        "metric": prompts[0]["metric"],
        "score": estimate(scores, [float(len(each["prompts"])) for each in group]),
        "entirely_right": proportion(sum(prompt["score"] >= 1 for prompt in prompts), len(prompts)),
    }
