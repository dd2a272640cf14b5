"""The tables of docs/published.md, by the names of their marks."""

from typing import Any

from benchmarks.published.constants import constants_table
from kvcluster.evaluation.pages import table
from kvcluster.evaluation.quality import METHODS, summarize
from kvcluster.evaluation.report import with_interval

__all__ = ["ROWS", "make_tables"]

Summaries = dict[tuple[str, float, bool], dict[str, Any]]  # by method, share kept, whether the question comes first

ROWS = {
    "chelsea-0": "`ChelseaCache`, no whole heads",
    "chelsea": "`ChelseaCache`, 4 % of the heads whole",
    "chelsea-10": "`ChelseaCache`, 10 % of the heads whole",
    "chunked": "`ClusteredCache`, soft matching",
    "chunked-10": "... 10 % of the heads whole (ours)",
    "distinctive": "`ClusteredCache`, distinctive matching (ours)",
    "distinctive-10": "... 10 % of the heads whole (ours)",
    "clusterkv": "`RecallCache.as_published`",
    "recall": "`RecallCache` (ours)",
}
TITLES = {"smollm2": "SmolLM2-135M", "gemma3-270m": "Gemma 3 270M"}
HEAD = ["kept", "entries", "method", "needles, question first", "needles, question later"]
HEAD += ["tasks, question first", "tasks, question later", "perplexity"]


def make_tables(
    by_model: dict[str, list[dict[str, Any]]], constants: list[dict[str, Any]], keeps: Any
) -> dict[str, str]:
    """Each as Markdown."""
    tables = {name: model_table(summaries_of(runs), keeps) for name, runs in by_model.items()}
    return {**tables, "full": full_table(by_model), "constants": constants_table(constants)}


def summaries_of(runs: list[dict[str, Any]]) -> Summaries:
    return {(x["method"], x["keep"], x["is_question_first"]): x for x in summarize(runs)}


def full_table(by_model: dict[str, list[dict[str, Any]]]) -> str:
    """What the full cache makes of the same contexts, as it is."""
    rows = []
    for name, runs in by_model.items():
        summaries = summaries_of(runs)
        first, later = summaries["full", 1.0, True], summaries["full", 1.0, False]
        cells = [TITLES[name], str(later["needles"]["n"])]
        cells += [with_interval(x["needles"]["token_accuracy"], to="-") for x in (first, later)]
        cells += [f"{score(x):.3f}" for x in (first, later)]
        rows.append([*cells, with_interval(later["perplexity"]["value"], to="-")])
    return table(["model", "needles", *HEAD[3:]], rows)


def model_table(summaries: Summaries, keeps: Any) -> str:
    """A row for each method and share kept, over the full cache's; what a method was not run at is left out."""
    full = {is_first: summaries["full", 1.0, is_first] for is_first in (True, False)}
    rows = []
    for keep in sorted({keep for name, keep, _ in summaries if name in ROWS}, reverse=True):
        for name, title in ROWS.items():
            both = [summaries.get((name, keep, is_first)) for is_first in (True, False)]
            if both[0] is None or both[1] is None:
                continue
            first, later = both[0], both[1]
            stored = "all" if METHODS[name].stores_all else f"{later['entries']:.3f}"
            needles = [with_interval(x["needles"]["of_full"], to="-") for x in (first, later)]
            tasks = [f"{score(x) / score(full[x['is_question_first']]):.2f}" for x in (first, later)]
            perplexity = with_interval(later["perplexity"]["of_full"], to="-")
            rows.append([f"{keep:g}", stored, title, *needles, *tasks, perplexity])
    return table(HEAD, rows)


def score(summary: dict[str, Any]) -> float:
    """Mean over the tasks of their mean score."""
    scores = [task["score"]["value"] for task in summary["tasks"].values()]
    return sum(scores) / len(scores)
