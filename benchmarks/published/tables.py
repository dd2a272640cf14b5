"""The tables of docs/published.md, by the names of their marks."""

from typing import Any

from kvcluster.evaluation.pages import table
from kvcluster.evaluation.quality import METHODS, summarize
from kvcluster.evaluation.report import with_interval
from kvcluster.evaluation.statistics import estimate

__all__ = ["ROWS", "make_tables"]

Runs = dict[tuple[str, float, bool], list[dict[str, Any]]]  # by method, share kept, whether the question comes first

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
SETTINGS = (True, False)  # whether the question comes first
KINDS = ("digits", "words")
HEAD = ["kept", "entries", "method", "digits, first", "digits, later", "words, first", "words, later"]
HEAD += ["tasks, first", "tasks, later", "perplexity"]


def make_tables(by_model: dict[str, list[dict[str, Any]]]) -> dict[str, str]:
    """Each as Markdown."""
    tables = {name: model_table(grouped(runs)) for name, runs in by_model.items()}
    return {**tables, "full": full_table(by_model)}


def grouped(runs: list[dict[str, Any]]) -> Runs:
    groups: Runs = {}
    for run in runs:
        key = run["key"]
        groups.setdefault((key["method"], key["keep"], key.get("is_question_first", False)), []).append(run)
    return groups


def full_table(by_model: dict[str, list[dict[str, Any]]]) -> str:
    """What the full cache makes of the same contexts, the same in both settings, as it is."""
    rows = []
    for name, runs in by_model.items():
        full = grouped(runs)["full", 1.0, False]
        summary = summarize(full)[0]
        cells = [TITLES[name], str(summary["needles"]["n"])]
        for kind in KINDS:
            sums = [run["needles"]["kinds"][kind] for run in full if "needles" in run]
            cells.append(with_interval(estimate(*([x[part] for x in sums] for part in ("right", "tokens"))), to="-"))
        cells += [f"{score(full):.3f}", with_interval(summary["perplexity"]["value"], to="-")]
        rows.append(cells)
    return table(["model", "needles", *KINDS, "tasks", "perplexity"], rows)


def model_table(runs: Runs) -> str:
    """A row for each method and share kept, over the full cache's; what a method was not run at is left out."""
    rows = []
    for keep in sorted({keep for name, keep, _ in runs if name in ROWS}, reverse=True):
        for name, title in ROWS.items():
            if (name, keep, False) in runs:
                rows.append([f"{keep:g}", *row(runs, name, keep, title)])
    return table(HEAD, rows)


def row(runs: Runs, name: str, keep: float, title: str) -> list[str]:
    """Entries, title, needles of each kind in both settings, tasks in both, perplexity."""
    later, full = runs[name, keep, False], runs["full", 1.0, False]
    summary = summarize([*full, *later])[1]
    cells = ["all" if METHODS[name].stores_all else f"{summary['entries']:.3f}", title]
    for kind in KINDS:
        for setting in SETTINGS:
            both = (
                [run["needles"]["kinds"][kind]["right"] for run in group if "needles" in run]
                for group in (runs[name, keep, setting], runs["full", 1.0, setting])
            )
            cells.append(with_interval(estimate(*both), to="-"))
    cells += [over(score(runs[name, keep, setting]), score(runs["full", 1.0, setting])) for setting in SETTINGS]
    return [*cells, with_interval(summary["perplexity"]["of_full"], to="-")]


def over(part: float, whole: float) -> str:
    """A ratio; a dash where the full cache knows nothing either."""
    return f"{part / whole:.2f}" if whole else "-"


def score(runs: list[dict[str, Any]]) -> float:
    """Mean over all answers that were generated."""
    scores = [prompt["score"] for run in runs for prompt in run.get("prompts", ())]
    return sum(scores) / len(scores)
