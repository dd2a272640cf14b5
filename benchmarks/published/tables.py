"""The tables of docs/published.md, by the names of their marks."""

from typing import Any

from kvcluster.evaluation.pages import table
from kvcluster.evaluation.quality import METHODS, summarize
from kvcluster.evaluation.report import with_interval
from kvcluster.evaluation.statistics import estimate

__all__ = ["ROWS", "make_tables", "peers_table"]

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
BESIDE_PEERS = ("chelsea", "chelsea-10", "chunked-10", "distinctive", "distinctive-10")
TITLES = {"smollm2": "SmolLM2-135M", "gemma3-270m": "Gemma 3 270M"}
NUMBERS = {"smollm2": 2 * 3 * 64, "gemma3-270m": 2 * 256}  # of an entry of a layer: keys and values of all KV heads
FLOAT32, BFLOAT16 = 4, 2  # bytes of a number: as the models ran, as bytes are compared
SETTINGS = (True, False)  # whether the question comes first
KINDS = ("digits", "words")
HEAD = ["kept", "entries", "bytes", "method", "digits, first", "digits, later", "words, first", "words, later"]
HEAD += ["tasks, first", "tasks, later", "perplexity"]


def make_tables(by_model: dict[str, list[dict[str, Any]]]) -> dict[str, str]:
    """Each as Markdown."""
    tables = {name: model_table(name, grouped(runs)) for name, runs in by_model.items()}
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


def model_table(name: str, runs: Runs) -> str:
    """A row for each method and share kept, over the full cache's; what a method was not run at is left out."""
    rows = []
    for keep in sorted({keep for method, keep, _ in runs if method in ROWS}, reverse=True):
        for method, title in ROWS.items():
            if (method, keep, False) in runs:
                of_bytes = share_of_bytes(runs[method, keep, False], runs["full", 1.0, False], NUMBERS[name])
                entries, *cells = row(runs, method, keep, title)
                rows.append([f"{keep:g}", entries, f"{of_bytes:.3f}", *cells])
    return table(HEAD, rows)


def share_of_bytes(group: list[dict[str, Any]], full: list[dict[str, Any]], numbers: int) -> float:
    """Bytes in bfloat16 of the layers that attend to everything, counts and indices included, over the full cache's.

    The runs were in float32; the bytes of layers with a sliding window are what the full cache has besides its entries.
    """
    full_of = {run["key"]["case"]: run for run in full}
    held = whole = 0.0
    for run in group:
        of_case = full_of[run["key"]["case"]]
        sliding = of_case["nbytes"] - FLOAT32 * numbers * of_case["stored"]["entries"]
        held += run["nbytes"] - sliding - (FLOAT32 - BFLOAT16) * numbers * run["stored"]["entries"]
        whole += BFLOAT16 * numbers * of_case["stored"]["entries"]
    return held / whole


def peers_table(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> str:
    """Ours beside kvpress's presses on the same contexts; in each share kept the best come first, question first."""
    runs, peers = grouped(ours), grouped(theirs)
    n_contexts = sum("needles" in run for run in runs["full", 1.0, True])
    done = {key for key, group in peers.items() if len(group) == n_contexts}
    names = dict.fromkeys(name for name, _, _ in peers if name.startswith("kvpress "))
    rows = []
    for keep in sorted({keep for _, keep, _ in peers if keep < 1}, reverse=True):
        found = [(name, peers) for name in names if {(name, keep, setting) for setting in SETTINGS} <= done]
        found += [(name, runs) for name in BESIDE_PEERS if (name, keep, True) in runs]
        of_keep = [
            [f"{keep:g}", titled(name), *kind_cells(group, runs, name, keep), perplexity(group, runs, name, keep)]
            for name, group in found
        ]
        rows += sorted(of_keep, key=lambda cells: cells[2], reverse=True)
    return table(["kept", "method", *HEAD[4:8], HEAD[-1]], rows)


def titled(name: str) -> str:
    """Of a row that does not stand below the one that it belongs to."""
    if name not in ROWS:
        return name
    return ROWS[name].replace("...", ROWS[name.removesuffix("-10")].removesuffix(" (ours)") + ",")


def kind_cells(runs: Runs, full: Runs, name: str, keep: float) -> list[str]:
    """Right tokens of each kind of needle, in both settings, over the full cache's."""
    cells = []
    for kind in KINDS:
        for setting in SETTINGS:
            both = (
                [run["needles"]["kinds"][kind]["right"] for run in group if "needles" in run]
                for group in (runs[name, keep, setting], full["full", 1.0, setting])
            )
            cells.append(with_interval(estimate(*both), to="-"))
    return cells


def perplexity(runs: Runs, full: Runs, name: str, keep: float) -> str:
    """Of the text that follows, over the full cache's."""
    summary = summarize([*full["full", 1.0, False], *runs[name, keep, False]])[1]
    return with_interval(summary["perplexity"]["of_full"], to="-")


def row(runs: Runs, name: str, keep: float, title: str) -> list[str]:
    """Entries, title, needles of each kind in both settings, tasks in both, perplexity."""
    entries = summarize([*runs["full", 1.0, False], *runs[name, keep, False]])[1]["entries"]
    cells = ["all" if METHODS[name].stores_all else f"{entries:.3f}", title, *kind_cells(runs, runs, name, keep)]
    cells += [over(score(runs[name, keep, setting]), score(runs["full", 1.0, setting])) for setting in SETTINGS]
    return [*cells, perplexity(runs, runs, name, keep)]


def over(part: float, whole: float) -> str:
    """A ratio; a dash where the full cache knows nothing either."""
    return f"{part / whole:.2f}" if whole else "-"


def score(runs: list[dict[str, Any]]) -> float:
    """Mean over all answers that were generated."""
    scores = [prompt["score"] for run in runs for prompt in run.get("prompts", ())]
    return sum(scores) / len(scores)
