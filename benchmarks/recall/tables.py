"""From runs to tables: token accuracy with its uncertainty, and what happened to attention."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import binomtest, bootstrap

from benchmarks.recall.settings import BUDGETS, FULL, OURS, PAGES, PAPER, TOP
from kvcluster.evaluation.report import Claim, Line, Section

__all__ = ["Result", "attention_table", "collect", "needle_table", "option_table"]

MOST_LOSS, CLAIMED_BUDGET = 0.05, 512
COMPARED = (TOP, OURS, PAPER, PAGES)


@dataclass(frozen=True)
class Result:
    """One setting at one budget, over all needles.

    Attributes
    ----------
    accuracy : right tokens / tokens; `low`, `high` is a 95 % interval, by resampling needles.
    kept : accuracy / that of the full cache, with its interval, by resampling the needles of both together.
    exact : needles with all tokens right / needles; interval by Wilson.
    nll : nats per token.
    attention : means of what was measured, by name.
    """

    n_needles: int
    accuracy: float
    low: float
    high: float
    kept: float
    kept_low: float
    kept_high: float
    exact: float
    exact_low: float
    exact_high: float
    nll: float
    attention: dict[str, float]


def collect(runs: list[dict[str, Any]]) -> dict[tuple[str, int], Result]:
    """Results by (setting, budget) of those that ran on every context."""
    contexts = {run["context"] for run in runs}
    grouped: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for run in sorted(runs, key=lambda run: run["context"]):
        grouped.setdefault((run["setting"], run["budget"]), []).append(run)
    whole = {key: group for key, group in grouped.items() if {run["context"] for run in group} == contexts}
    if (FULL, 0) not in whole:
        return {}
    full = right_per_needle(whole[FULL, 0])
    return {key: result(group, full) for key, group in whole.items()}


def right_per_needle(group: list[dict[str, Any]]) -> np.ndarray:
    """(needles, digits) booleans."""
    return np.array([row for run in group for row in run["is_right"]])


def result(group: list[dict[str, Any]], full: np.ndarray) -> Result:
    is_right = right_per_needle(group)
    share, full_share = is_right.mean(axis=1), full.mean(axis=1)
    low, high = interval((share,), lambda mine, axis: mine.mean(axis=axis))
    kept_low, kept_high = interval(
        (share, full_share), lambda mine, theirs, axis: mine.mean(axis=axis) / theirs.mean(axis=axis)
    )
    n_exact = int(is_right.all(axis=1).sum())
    wilson = binomtest(n_exact, len(is_right)).proportion_ci(method="wilson")
    measured = [run["attention"] for run in group]
    return Result(
        n_needles=len(is_right),
        accuracy=float(share.mean()),
        low=low,
        high=high,
        kept=float(share.mean() / full_share.mean()),
        kept_low=kept_low,
        kept_high=kept_high,
        exact=n_exact / len(is_right),
        exact_low=float(wilson.low),
        exact_high=float(wilson.high),
        nll=float(np.mean([row for run in group for row in run["nll"]])),
        attention={name: float(np.mean([each[name] for each in measured])) for name in measured[0]},
    )


def interval(samples: tuple[np.ndarray, ...], statistic: Any) -> tuple[float, float]:
    """95 % percentile interval of a statistic of paired samples."""
    found = bootstrap(samples, statistic, paired=True, vectorized=True, method="percentile", rng=0).confidence_interval
    return float(found.low), float(found.high)


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
        "In brackets: 95 % intervals. Targets: at 512 ours loses at most 5 % of the full cache's accuracy; at every"
        " budget pages reach at most ours.",
        {"results": {f"{name} {budget}": vars(each) for (name, budget), each in results.items()}},
    )


def needle_claim(name: str, budget: int, results: dict[tuple[str, int], Result]) -> Claim | None:
    mine = results[name, budget]
    if name == OURS and budget == CLAIMED_BUDGET:
        return Claim(f"accuracy lost at budget {budget}", 1 - mine.kept, MOST_LOSS)
    if name == PAGES and (OURS, budget) in results:
        ours = results[OURS, budget].accuracy
        return Claim(f"accuracy of pages over ours at {budget}", mine.accuracy / ours if ours else np.inf, 1.0)
    return None


def answer_line(name: str, budget: int, mine: Result, claim: Claim | None = None) -> Line:
    cells = (
        name,
        f"{budget:,}" if budget else "all",
        f"{mine.accuracy:.3f} ({mine.low:.3f} to {mine.high:.3f})",
        f"{mine.kept:.3f} ({mine.kept_low:.3f} to {mine.kept_high:.3f})",
        f"{mine.exact:.2f} ({mine.exact_low:.2f} to {mine.exact_high:.2f})",
        f"{mine.nll:.3f}",
    )
    return Line(cells, claim)


def attention_table(results: dict[tuple[str, int], Result]) -> Section:
    """What was attended to, and how wrong the output was."""
    lines = []
    for name in COMPARED:
        for budget in BUDGETS:
            if (name, budget) in results:
                mine = results[name, budget].attention
                rates = (f"{mine['recall_rate']:.3f}", f"{mine['mass']:.3f}", f"{mine['error']:.3f}")
                lines.append(Line((name, f"{budget:,}", *rates, f"{mine['entries']:.0f}")))
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
        mine = results[name, budget]
        rates = (f"{mine.attention['recall_rate']:.3f}", f"{mine.attention['mass']:.3f}")
        lines.append(Line((*answer_line(name, budget, mine).cells, *rates, f"{mine.attention['entries']:.0f}")))
    return Section(
        "Options, one at a time",
        ("setting", "budget", "token accuracy", "kept", "all right", "nats", "recall rate", "mass", "entries"),
        lines,
        "In brackets: 95 % intervals. Centroids for the rest come on top of the entries counted.",
    )
