"""From runs to numbers with their uncertainty, one summary for each method and share of entries kept.

Needles of one context are not independent of each other. So the 95 % intervals of token accuracy, of negative
log-likelihood, of perplexity and of ratios to the full cache come from resampling whole contexts (percentiles of 10,000
bootstrap samples; none with fewer than two contexts). Those of shares of needles or prompts that are entirely right are
Wilson's, which take them for independent.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

__all__ = ["summarize", "wilson"]

N_SAMPLES = 10_000
Z = 1.959963984540054  # 97.5 % of a normal variable lies below
Statistic = Callable[[np.ndarray, np.ndarray], np.ndarray]


def wilson(n_right: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion."""
    centre, spread = n_right + Z**2 / 2, Z * math.sqrt(n_right * (n - n_right) / n + Z**2 / 4)
    return max(0.0, (centre - spread) / (n + Z**2)), min(1.0, (centre + spread) / (n + Z**2))


def ratio_of_sums(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return above.sum(axis=-1) / below.sum(axis=-1)


def exp_ratio_of_sums(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return np.exp(ratio_of_sums(above, below))


def estimate(above: Sequence[float], below: Sequence[float], statistic: Statistic = ratio_of_sums) -> dict[str, Any]:
    """A statistic of one pair of numbers for each context, and its interval."""
    pair = np.array(above, dtype=np.float64), np.array(below, dtype=np.float64)
    if not pair[1].sum():
        return {"value": None, "low": None, "high": None}
    value = float(statistic(*pair))
    if len(above) < 2:
        return {"value": value, "low": None, "high": None}
    chosen = np.random.default_rng(0).integers(len(above), size=(N_SAMPLES, len(above)))
    below_sampled = pair[1][chosen]
    has_any = below_sampled.sum(axis=-1) > 0
    samples = statistic(pair[0][chosen][has_any], below_sampled[has_any])
    low, high = np.quantile(samples, (0.025, 0.975))
    return {"value": value, "low": float(low), "high": float(high)}


def proportion(are_right: list[bool]) -> dict[str, Any]:
    low, high = wilson(sum(are_right), len(are_right))
    return {"value": sum(are_right) / len(are_right), "low": low, "high": high}


def summarize(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Summaries in the order of the first results, each over all contexts of its method and `keep`, ready for JSON.

    Ratios are to the full cache on the same cases; there are none if it did not run on all of them.
    """
    grouped: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for each in results:
        grouped.setdefault((each["key"]["method"], each["key"]["keep"]), []).append(each)
    full = {each["key"]["case"]: each for each in grouped.get(("full", 1.0), [])}
    return [{"method": method, "keep": keep, **summary_of(group, full)} for (method, keep), group in grouped.items()]


def summary_of(group: list[dict[str, Any]], full: dict[str, dict[str, Any]]) -> dict[str, Any]:
    has_full = all(each["key"]["case"] in full for each in group)
    peers = [full[each["key"]["case"]] for each in group] if has_full else []
    n_tokens = sum(each["n_tokens"] * len(each["n_stored"]) for each in group)
    made: dict[str, Any] = {
        "n_contexts": len(group),
        "entries": sum(sum(each["n_stored"]) for each in group) / n_tokens,
        "bytes": sum(each["nbytes"] for each in group) / sum(p["nbytes"] for p in peers) if peers else None,
        "seconds": {
            part: float(np.median([each["seconds"][part] for each in group])) for part in ("clustering", "asking")
        },
    }
    if with_needles := pairs_with(group, peers, "needles"):
        made["needles"] = needle_summary(with_needles)
    if with_text := pairs_with(group, peers, "following_nll"):
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


def right_tokens(result: dict[str, Any] | None) -> float:
    return 0.0 if result is None else float(sum(sum(needle["is_right"]) for needle in result["needles"]))


def needle_summary(pairs: Pairs) -> dict[str, Any]:
    group = [each for each, _ in pairs]
    needles = [needle for each in group for needle in each["needles"]]
    n_tokens = [float(sum(len(needle["nll"]) for needle in each["needles"])) for each in group]
    nll = [float(sum(sum(needle["nll"]) for needle in each["needles"])) for each in group]
    right = [right_tokens(each) for each in group]
    kinds = list(dict.fromkeys(needle["kind"] for needle in needles))
    return {
        "n": len(needles),
        "token_accuracy": estimate(right, n_tokens),
        "of_full": estimate(right, [right_tokens(peer) for _, peer in pairs]),
        "exact": proportion([all(needle["is_right"]) for needle in needles]),
        "nll": estimate(nll, n_tokens),
        "by_kind": {kind: means([each for each in needles if each["kind"] == kind]) for kind in kinds},
    }


def means(needles: list[dict[str, Any]]) -> dict[str, Any]:
    """Token accuracy, share that is exact, nats a token; without intervals."""
    n_tokens = sum(len(each["nll"]) for each in needles)
    return {
        "n": len(needles),
        "token_accuracy": sum(sum(each["is_right"]) for each in needles) / n_tokens,
        "exact": sum(all(each["is_right"]) for each in needles) / len(needles),
        "nll": sum(sum(each["nll"]) for each in needles) / n_tokens,
    }


def perplexity_summary(pairs: Pairs) -> dict[str, Any]:
    n = [float(len(each["following_nll"])) for each, _ in pairs]
    nll = [sum(each["following_nll"]) for each, _ in pairs]
    more = [a - (sum(peer["following_nll"]) if peer else 0.0) for a, (_, peer) in zip(nll, pairs, strict=True)]
    has_full = all(peer is not None for _, peer in pairs)
    return {
        "n_tokens": int(sum(n)),
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
        "entirely_right": proportion([prompt["score"] >= 1 for prompt in prompts]),
    }
