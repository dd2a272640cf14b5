"""From runs, ours and the peers', to what the quality page says: numbers with intervals, and how methods compare."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kvcluster.evaluation.quality import summarize
from kvcluster.evaluation.runs import condense, total
from kvcluster.evaluation.statistics import estimate, exp_ratio_of_sums

__all__ = ["MEASURES", "Measure", "Results", "by_depth", "collect", "compare"]

Run = dict[str, Any]  # condensed


@dataclass(frozen=True)
class Results:
    """All runs on the same contexts.

    Attributes
    ----------
    summaries : of `kvcluster.evaluation.quality.summarize`, by method and share kept.
    runs : by method and share kept, in the order of contexts.
    unfinished : methods and shares that did not run on all contexts; they are in none of the others.
    """

    summaries: dict[tuple[str, float], dict[str, Any]]
    runs: dict[tuple[str, float], list[Run]]
    unfinished: list[tuple[str, float]]

    @property
    def full(self) -> list[Run]:
        return self.runs["full", 1.0]

    @property
    def keeps(self) -> list[float]:
        return sorted({keep for name, keep in self.runs if keep < 1}, reverse=True)

    def methods(self, keep: float) -> list[str]:
        return [name for name, kept in self.runs if kept == keep]


def collect(runs: list[Run], ours: Sequence[str] = ()) -> Results:
    """Results on the contexts that the full cache and all of `ours` ran on, as far as these ran anywhere.

    Runs on other contexts or of other weights are left out.

    Raises
    ------
    ValueError : no such context.
    """
    runs = [condense(run) for run in runs]
    full = {run["key"]["case"]: run["key"] for run in runs if run["key"]["method"] == "full"}
    wanted = {(run["key"]["method"], run["key"]["keep"]) for run in runs if run["key"]["method"] in ours}
    done = {(run["key"]["method"], run["key"]["keep"], run["key"]["case"]) for run in runs}
    full = {case: key for case, key in full.items() if all((*pair, case) in done for pair in wanted)}
    if not full:
        raise ValueError("runs must have a context that the full cache and all of ours ran on, got none")
    grouped: dict[tuple[str, float], dict[str, Run]] = {}
    for run in runs:
        key = run["key"]
        if key["case"] in full and key["model"] == full[key["case"]]["model"]:
            grouped.setdefault((key["method"], key["keep"]), {})[key["case"]] = run
    complete = {
        pair: [by_case[case] for case in full] for pair, by_case in grouped.items() if len(by_case) == len(full)
    }
    summaries = {
        (summary["method"], summary["keep"]): summary
        for summary in summarize([run for group in complete.values() for run in group])
    }
    return Results(summaries, complete, [pair for pair in grouped if pair not in complete])


def of_needles(above: str, below: str) -> Callable[[Run], tuple[float, float]]:
    """Two of the sums over all needles of a context."""

    def pair(run: Run) -> tuple[float, float]:
        sums = total(run["needles"]["kinds"].values())
        return sums[above], sums[below]

    return pair


@dataclass(frozen=True)
class Measure:
    """What methods are compared by.

    Attributes
    ----------
    of : two numbers of a context; their sums over contexts are divided.
    is_better_high : whether more is better.
    is_ratio : compare by the exponential of the difference.
    """

    name: str
    of: Callable[[Run], tuple[float, float]]
    is_better_high: bool
    is_ratio: bool = False


MEASURES = {
    "accuracy": Measure("needle token accuracy", of_needles("right", "tokens"), True),
    "exact": Measure("exact needles", of_needles("exact", "n"), True),
    "nll": Measure("nats a needle token", of_needles("nll", "tokens"), False),
    "perplexity": Measure(
        "perplexity", lambda run: (run["following"]["nll"], run["following"]["n"]), False, is_ratio=True
    ),
}


@dataclass(frozen=True)
class Comparison:
    """One method beside another on the same contexts.

    Attributes
    ----------
    value, low, high : the difference of the first from the second, or their ratio if the measure is one; the 95 %
        interval comes from resampling contexts, both methods on the same ones.
    verdict : "above" or "below" if the whole interval is on that side, better being above; otherwise "level".
    side : "ahead", "equal" or "behind", by the value alone.
    """

    value: float
    low: float | None
    high: float | None
    verdict: str
    side: str


def compare(measure: Measure, first: list[Run], second: list[Run]) -> Comparison:
    """The first method beside the second."""
    pairs = [(measure.of(a), measure.of(b)) for a, b in zip(first, second, strict=True)]
    differences, per = [a[0] - b[0] for a, b in pairs], [float(a[1]) for a, _ in pairs]
    difference = estimate(differences, per, exp_ratio_of_sums) if measure.is_ratio else estimate(differences, per)
    equal = 1.0 if measure.is_ratio else 0.0
    sign = 1 if measure.is_better_high else -1
    gain = sign * (difference["value"] - equal)
    side = "ahead" if gain > 0 else "behind" if gain < 0 else "equal"
    verdict = "level"
    if difference["low"] is not None and (difference["low"] > equal or difference["high"] < equal):
        verdict = "above" if gain > 0 else "below"
    return Comparison(difference["value"], difference["low"], difference["high"], verdict, side)


def by_depth(runs: list[Run]) -> list[float | None]:
    """Token accuracy of needles in each part of the context; None where there is none."""
    parts = zip(*(run["needles"]["depths"] for run in runs), strict=True)  # each (right, tokens) of all contexts
    sums = [tuple(map(sum, zip(*part, strict=True))) for part in parts]
    return [right / tokens if tokens else None for right, tokens in sums]
