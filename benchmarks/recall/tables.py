"""From runs to tables: token accuracy with its uncertainty, and what happened to attention."""

import math
import statistics
from dataclasses import dataclass
from typing import Any

from benchmarks.recall.settings import BUDGETS, FULL, OURS, PAGES, PAPER, TOP
from kvcluster.evaluation.report import Claim, Line, Section, with_interval
from kvcluster.evaluation.runs import total
from kvcluster.evaluation.statistics import estimate

__all__ = ["Result", "attention_table", "collect", "needle_table", "option_table"]

MOST_LOSS, CLAIMED_BUDGET = 0.05, 512
COMPARED = (TOP, OURS, PAPER, PAGES)


@dataclass(frozen=True)
class Result:
    """One setting at one budget, over all contexts.

    Attributes
    ----------
    accuracy : right tokens / tokens, with its 95 % interval, as are the others from resampling contexts.
    kept : right tokens / those of the full cache, in the same contexts.
    exact : needles with all tokens right / needles.
    nll : nats per token.
    attention : means of what was measured, by name.
    """

    n_needles: int
    accuracy: dict[str, Any]
    kept: dict[str, Any]
    exact: dict[str, Any]
    nll: float
    attention: dict[str, float]


def collect(runs: list[dict[str, Any]]) -> dict[tuple[str, int], Result]:
    """Results by (setting, budget) of those that ran on every context."""
    runs = sorted((run for run in runs if run["key"]["part"] == "needles"), key=lambda run: run["key"]["context"])
    contexts = {run["key"]["context"] for run in runs}
    grouped: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for run in runs:
        grouped.setdefault((run["key"]["setting"], run["key"]["budget"]), []).append(run)
    complete = {pair: group for pair, group in grouped.items() if len(group) == len(contexts)}
    if (FULL, 0) not in complete:
        return {}
    return {pair: result(group, complete[FULL, 0]) for pair, group in complete.items()}


def result(group: list[dict[str, Any]], full: list[dict[str, Any]]) -> Result:
    right, tokens, exact, n = ([run["needles"][name] for run in group] for name in ("right", "tokens", "exact", "n"))
    sums, measured = total(run["needles"] for run in group), [run["attention"] for run in group]
    return Result(
        n_needles=sums["n"],
        accuracy=estimate(right, tokens),
        kept=estimate(right, [run["needles"]["right"] for run in full]),
        exact=estimate(exact, n),
        nll=sums["nll"] / sums["tokens"],
        attention={name: statistics.fmean(attention[name] for attention in measured) for name in measured[0]},
    )


def needle_table(results: dict[tuple[str, int], Result]) -> Section:
    """Answers by setting and budget, with the two targets: kept at 512, better than pages everywhere."""
    lines = [answer_line(FULL, 0, results[FULL, 0])]
    for name in COMPARED:
        for budget in BUDGETS:
            if (name, budget) in results:
                lines.append(answer_line(name, budget, results[name, budget], needle_claim(name, budget, results)))
    return Section(
        f"Needles: {results[FULL, 0].n_needles} numbers asked for after the cache was built",
        ("attention", "budget", "token accuracy", "kept of full", "all digits right", "nats / token"),
        lines,
        "In brackets: 95 % intervals, from resampling contexts. Targets: at 512 ours loses at most 5 % of the full "
        "cache's accuracy; at every budget pages reach at most ours.",
        {"results": {f"{name} {budget}": vars(result) for (name, budget), result in results.items()}},
    )


def needle_claim(name: str, budget: int, results: dict[tuple[str, int], Result]) -> Claim | None:
    result = results[name, budget]
    if name == OURS and budget == CLAIMED_BUDGET:
        return Claim(f"accuracy lost at budget {budget}", 1 - result.kept["value"], MOST_LOSS)
    if name == PAGES and (OURS, budget) in results:
        theirs, ours = result.accuracy["value"], results[OURS, budget].accuracy["value"]
        return Claim(f"accuracy of pages over ours at {budget}", theirs / ours if ours else math.inf, 1.0)
    return None


def answer_line(name: str, budget: int, result: Result, claim: Claim | None = None) -> Line:
    cells = (
        name,
        f"{budget:,}" if budget else "all",
        with_interval(result.accuracy),
        with_interval(result.kept),
        with_interval(result.exact, digits=2),
        f"{result.nll:.3f}",
    )
    return Line(cells, claim)


def attention_table(results: dict[tuple[str, int], Result]) -> Section:
    """What was attended to, and how wrong the output was."""
    lines = []
    for name in COMPARED:
        for budget in BUDGETS:
            if (name, budget) in results:
                measured = results[name, budget].attention
                rates = (f"{measured['recall_rate']:.3f}", f"{measured['mass']:.3f}", f"{measured['error']:.3f}")
                lines.append(Line((name, f"{budget:,}", *rates, f"{measured['entries']:.0f}")))
    return Section(
        "Attention while the answers are made, mean over layers from the third on, heads and tokens",
        ("attention", "budget", "recall rate of top 64", "share of mass", "output error", "entries"),
        lines,
        "Against full attention of the same query. The first two layers are left out: the paper's are dense.",
    )


def option_table(results: dict[tuple[str, int], Result]) -> Section:
    """Every other setting, each beside what it is a variation of."""
    others = [key for key in results if key[0] not in (FULL, *COMPARED)]
    lines = []
    for name, budget in others:
        result = results[name, budget]
        rates = (f"{result.attention['recall_rate']:.3f}", f"{result.attention['mass']:.3f}")
        lines.append(Line((*answer_line(name, budget, result).cells, *rates, f"{result.attention['entries']:.0f}")))
    return Section(
        "Options, one at a time",
        ("setting", "budget", "token accuracy", "kept", "all right", "nats", "recall rate", "mass", "entries"),
        lines,
        "In brackets: 95 % intervals, from resampling contexts. Centroids for the rest come on top of the entries "
        "counted.",
    )
