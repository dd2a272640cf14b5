"""What a context keeps if a chunk's tokens are chosen by what the next tokens look at: `make bench-attended`.

Attended matching beside distinctive matching, with the shares of each model's profile, exact and in four bits, needles
and perplexity, the question after the compression: docs/attended.md. Which layers of a model profit is found on the
first half of the text (`--part tuning`). Every run is kept as sums of its context, and only what is missing there runs:
after a change to a method, remove its lines.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # of a script only its own folder is on the path

import torch
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import Progress
from transformers.utils.logging import disable_progress_bar

from benchmarks.lengths.run import PARTS
from benchmarks.published.run import without_texts
from benchmarks.published.tables import TITLES
from kvcluster.evaluation.models import load_model
from kvcluster.evaluation.pages import fill, table
from kvcluster.evaluation.quality import needle_cases, run_all, summarize
from kvcluster.evaluation.quality.methods import METHODS, Method, by_shares, shipped
from kvcluster.evaluation.report import with_interval
from kvcluster.evaluation.runs import Runs
from kvcluster.evaluation.texts import built_in_text, encode
from kvcluster.fast import Attended, Distinctive
from kvcluster.fast.huggingface.hooks import MODEL_TYPES

__all__ = ["main"]

HERE = Path(__file__).resolve().parent
PAGE = ROOT / "docs" / "attended.md"
REREADING = HERE.parent / "peers" / "results" / "rereading.jsonl"
MODELS = "smollm2", "gemma3-270m"
N_TOKENS, N_CONTEXTS = 4096, 4
KINDS = {"distinctive": "distinctive matching", "attended": "attended matching"}
METHOD: dict[str, Any] = {"distinctive": Distinctive(), "attended": Attended()}
BITS: dict[int, dict[str, Any]] = {16: {}, 4: {"bits": 4, "n_exact": 32}}
# What is compared, and layers of Gemma that are tried on the first half of the text.
BOTH = {
    f"{kind}-{bits}": Method(
        by_shares(METHOD[kind], shipped, **how), said, is_blind=kind != "attended", profile=shipped
    )
    for kind, said in KINDS.items()
    for bits, how in BITS.items()
}
KEPT = {16: (0.25, 0.156, 0.1), 4: (0.25, 0.2, 0.14)}
PAIRS = [(f"{kind}-{bits}", keep) for bits, keeps in KEPT.items() for kind in KINDS for keep in keeps]
WHERE = [(), (5,), (11,), (17,), (5, 17), (5, 11, 17)]
N_LAYERS = 18


def main() -> None:
    """Measure what is missing, fill in the page, print its tables."""
    parser = argparse.ArgumentParser(description="Attended matching: docs/attended.md.")
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--part", choices=PARTS, default=PARTS[0], help="of the text; layers are chosen on the latter")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--page-only", action="store_true", help="measure nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    disable_progress_bar()
    if not arguments.page_only:
        for name in arguments.models:
            measure(name, arguments.part)
    tables = {name: model_table(name, Runs(results(name, PARTS[0])).all) for name in MODELS}
    tables[f"layers-{MODELS[1]}"] = layers_table(MODELS[1], Runs(results(MODELS[1], PARTS[1])).all)
    tables["rereading"] = rereading_table(Runs(results(MODELS[0], PARTS[0])).all, Runs(REREADING).all)
    PAGE.write_text(fill(PAGE.read_text(), tables))
    console = Console()
    for name, markdown in tables.items():
        console.print(f"\n{name}", Markdown(markdown))


def results(name: str, part: str) -> Path:
    return HERE / "results" / (f"{name}.jsonl" if part == PARTS[0] else f"{name}-{part}.jsonl")


def measure(name: str, part: str) -> None:
    """Every pair on every context of a part of the text."""
    model, tokenizer = load_model(name, MODEL_TYPES)
    tokens, runs = encode(tokenizer, built_in_text()), Runs(results(name, part), without_texts)
    cases = needle_cases(tokenizer, tokens, part, lengths=[N_TOKENS], n_contexts=N_CONTEXTS, n_following=512)
    methods, pairs = BOTH, PAIRS
    if part != PARTS[0]:
        methods = {
            in_words(where): Method(by_shares(with_attended(where), shipped), "", profile=shipped) for where in WHERE
        }
        pairs = [(each, 0.25) for each in methods]
    pairs = [("full", 1.0), *pairs]
    with Progress() as progress:
        bar = progress.add_task(f"{name}, {part}", total=len(cases) * len(pairs))
        how: dict[str, Any] = {"methods": METHODS | methods, "on_run": lambda: progress.advance(bar)}
        run_all(model, tokenizer, cases, pairs, runs, **how)


def with_attended(where: tuple[int, ...]) -> list[Any]:
    """A method for each layer of Gemma: attended matching in those."""
    return [METHOD["attended" if layer in where else "distinctive"] for layer in range(N_LAYERS)]


def in_words(where: tuple[int, ...]) -> str:
    return f"layers {', '.join(map(str, where))}" if where else "no layer"


def model_table(name: str, runs: list[dict[str, Any]]) -> str:
    """A row for each method and number of entries or bits, over the full cache's, as Markdown."""
    rows = []
    for summary in sorted(summarize(runs), key=lambda each: -(each["of_bfloat16"] or 0)):
        kind, _, bits = summary["method"].partition("-")
        if kind in KINDS:
            said = "exact" if bits == "16" else f"{bits} bits"
            rows.append(
                [
                    f"{summary['of_bfloat16']:.3f}",
                    f"{summary['entries']:.3f}",
                    f"{KINDS[kind]}, {said}",
                    *scores_of(summary),
                ]
            )
    head = ["bytes", "entries", "what", "needles", "perplexity"]
    return f"{TITLES[name]}:\n\n" + table(head, rows)


def scores_of(summary: dict[str, Any]) -> list[str]:
    """Needles and perplexity over the full cache's."""
    return [with_interval(summary[part]["of_full"], to="-") for part in ("needles", "perplexity")]


def layers_table(name: str, runs: list[dict[str, Any]]) -> str:
    """A row for each choice of layers with attended matching, a quarter kept, as Markdown."""
    rows = [
        [summary["method"], str(summary["n_contexts"]), *scores_of(summary)]
        for summary in summarize(runs)
        if summary["method"] != "full"
    ]
    return f"{TITLES[name]}:\n\n" + table(["attended matching in", "contexts", "needles", "perplexity"], rows)


def rereading_table(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> str:
    """Attended matching beside kvpress's presses that read the context again, on the contexts of both, as Markdown."""
    cases = {run["key"]["case"] for run in theirs}
    mine = [run for run in ours if run["key"]["case"] in cases and run["key"]["method"] in ("full", "attended-16")]
    rows = []
    for runs, names in ((mine, {"attended-16": "attended matching, one reading"}), (with_full(theirs), {})):
        rows += [
            [f"{each['keep']:g}", names.get(each["method"], each["method"]), str(each["n_contexts"]), *scores_of(each)]
            for each in summarize(runs)
            if each["method"] != "full" and each["keep"] in {run["key"]["keep"] for run in theirs}
        ]
    rows.sort(key=lambda row: -float(row[0]))
    return table(["entries", "what", "contexts", "needles", "perplexity"], rows)


def with_full(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The runs of another environment, whose full cache has its name there, of methods that ran on all contexts."""
    named = [
        run | {"key": run["key"] | {"method": "full"}} if run["key"]["method"].startswith("full (") else run
        for run in runs
    ]
    cases = {run["key"]["case"] for run in named if run["key"]["method"] == "full"}
    done: dict[tuple[str, float], set[str]] = {}
    for run in named:
        done.setdefault((run["key"]["method"], run["key"]["keep"]), set()).add(run["key"]["case"])
    return [run for run in named if done[run["key"]["method"], run["key"]["keep"]] == cases]


if __name__ == "__main__":
    main()
