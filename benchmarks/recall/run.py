"""How well a cache that recalls clusters answers, and what it costs, on this CPU: `python benchmarks/recall/run.py`.

Needles in 4,096 tokens of SmolLM2-135M, asked for after the cache was built, against the budget: recall of clusters,
pages as Quest chooses them, exact top tokens; then times. The code that is scored is the code that is timed. Settings
were chosen on other text and other needles. Every part that was measured is kept in a file, needles as sums of each
context, and only what is missing there runs: remove the file to start afresh. About eight minutes; `--parts options`
takes another eight.
"""

import argparse
import hashlib
import inspect
import itertools
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # of a script only its own folder is on the path

import torch
from rich.console import Console
from rich.progress import Progress

from benchmarks.recall.long import time_long
from benchmarks.recall.needles import plant
from benchmarks.recall.scoring import score
from benchmarks.recall.settings import BUDGETS, FULL, OURS, PAGES, PAPER, SETTINGS, TOP
from benchmarks.recall.tables import attention_table, collect, needle_table, option_table
from benchmarks.recall.tiers import time_tiers
from benchmarks.recall.timing import time_index, time_step
from kvcluster.evaluation.models import load_llama, smollm2_folder
from kvcluster.evaluation.quality.llama import read_layers
from kvcluster.evaluation.report import Claim, Line, Section, print_sections
from kvcluster.evaluation.runs import Runs, needle_sums
from kvcluster.fast import RecallCache

__all__ = ["main"]

RESULTS = Path(__file__).resolve().parent / "results" / "runs.jsonl"
FIGURES = ROOT / "docs" / "figures"
MAIN = (FULL, TOP, OURS, PAPER, PAGES)
PARTS = ("step", "index", "tiers", "needles", "options", "long")


def main() -> int:
    """Measure what is missing, print, draw; the exit status is 0 unless --check finds a target missed."""
    parser = argparse.ArgumentParser(description="Recall of clusters: answers and costs on this CPU.")
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=PARTS,
        default=PARTS[:-1],
        metavar="PART",
        help=f"of {', '.join(PARTS)}; all by default but the last, which needs Gemma 3 (make gemma)",
    )
    parser.add_argument("--runs", type=Path, default=RESULTS, metavar="FILE", help="kept from run to run")
    parser.add_argument("--figures", type=Path, default=FIGURES, metavar="FOLDER", help="where figures go")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a target is missed")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    parser.add_argument("--needles", choices=("reporting", "tuning"), default="reporting", help="which set")
    parser.add_argument("--contexts", type=int, default=4, help="texts")
    parser.add_argument("--per-context", type=int, default=12, help="needles in each text")
    parser.add_argument("--tokens", type=int, default=4_096, help="of each text")
    parser.add_argument("--budgets", type=int, nargs="+", default=BUDGETS, metavar="N", help="entries per KV head")
    parser.add_argument("--step-tokens", type=int, default=32_768, help="of the attention step that is timed")
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="begin nothing more after this long; another run goes on"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    console = Console(width=None if sys.stdout.isatty() else 160)
    arguments.runs.parent.mkdir(exist_ok=True)
    runs, configured = Runs(arguments.runs), configuration(arguments)
    with Progress(console=console, transient=True) as progress:
        measure(arguments, runs, configured, progress)
    runs_of_this = [run for run in runs.all if run["key"]["configuration"] == configured]
    if len(runs_of_this) < len(runs.all):
        console.print(f"{arguments.runs} also holds runs of other configurations; they are not shown")
    sections = make_sections(runs_of_this)
    print_sections(console, sections)
    draw(arguments.figures, runs_of_this)
    is_missed = any(not claim.is_met for section in sections for claim in section.claims)
    return 1 if arguments.check and is_missed else 0


def configuration(arguments: argparse.Namespace) -> str:
    """A digest of what runs must share to be compared: needles, sizes, torch, and the defaults of the cache."""
    shared = {
        "needles": arguments.needles,
        "tokens": arguments.tokens,
        "per_context": arguments.per_context,
        "step_tokens": arguments.step_tokens,
        "torch": torch.__version__,
        "threads": arguments.threads,
        "recall_cache": str(inspect.signature(RecallCache)),
    }
    return hashlib.sha256(json.dumps(shared).encode()).hexdigest()[:16]


def measure(arguments: argparse.Namespace, runs: Runs, configured: str, progress: Progress) -> None:
    """Add what is missing to the runs, each as it ends."""

    def bar(name: str, steps: int) -> Callable[[], object]:
        task = progress.add_task(name, total=steps)
        return lambda: progress.advance(task)

    def key(part: str, **details: Any) -> dict[str, Any]:
        return {"part": part, "configuration": configured, **details}

    begun = time.monotonic()
    missing = [part for part in ("step", "index", "tiers") if part in arguments.parts and runs.found(key(part)) is None]
    if "step" in missing:
        budget, rounds = min(1_024, arguments.step_tokens // 2), 15
        section = time_step(arguments.step_tokens, budget, rounds, bar("attention step", 4 * (rounds + 1)))
        runs.add({"key": key("step"), "section": pack(section)})
    if "long" in arguments.parts and runs.found(key("long", number=0)) is None:
        for number, section in enumerate(time_long(15, 24, bar)):
            runs.add({"key": key("long", number=number), "section": pack(section)})
    budgets = {0, *arguments.budgets}  # 0: the full cache's
    wanted = [setting for setting in SETTINGS if ("needles" if setting.name in MAIN else "options") in arguments.parts]
    todo = [
        (setting, budget, key("needles", setting=setting.name, budget=budget, context=context))
        for context in range(arguments.contexts)
        for setting in wanted
        for budget in setting.budgets
        if budget in budgets
    ]
    todo = [task for task in todo if runs.found(task[-1]) is None]
    if not todo and not {"index", "tiers"} & set(missing):
        return
    model, tokenizer = load_llama(smollm2_folder())
    size = {"n_tokens": arguments.tokens, "n_needles": arguments.per_context}
    first = plant(tokenizer, arguments.needles, 0, **size)
    if "index" in missing:
        runs.add({"key": key("index"), "section": pack(time_index(model, first, 512, 3, bar("index", 8)))})
    if "tiers" in missing:
        runs.add({"key": key("tiers"), "section": pack(time_tiers(model, first, 512, 48, bar("tiers", 5 * 49)))})
    advance = bar("needles", len(todo))
    for number, of_context in itertools.groupby(todo, key=lambda task: task[-1]["context"]):
        context = plant(tokenizer, arguments.needles, number, **size)
        read = read_layers(model, context.tokens)
        for setting, budget, of_run in of_context:
            if time.monotonic() - begun > 60 * arguments.minutes:
                return
            answers = score(model, context, read, lambda exact, layer: setting.of_layer(exact, layer, budget))  # noqa: B023
            runs.add(
                {"key": of_run, "needles": needle_sums(answers.is_right, answers.nll), "attention": answers.attention}
            )
            advance()


def pack(section: Section) -> dict[str, Any]:
    """A section as JSON, from which `unpack` restores it."""
    lines = [
        {"cells": line.cells, "claim": line.claim and vars(line.claim), "show": line.show} for line in section.lines
    ]
    return {**vars(section), "lines": lines}


def unpack(packed: dict[str, Any]) -> Section:
    lines = [
        Line(tuple(line["cells"]), line["claim"] and Claim(**line["claim"]), line["show"]) for line in packed["lines"]
    ]
    return Section(**{**packed, "lines": lines})


def make_sections(runs: list[dict[str, Any]]) -> list[Section]:
    results = collect(runs)
    sections = [needle_table(results), attention_table(results), option_table(results)] if results else []
    return [section for section in sections if section.lines] + [
        unpack(run["section"]) for run in runs if "section" in run
    ]


def draw(folder: Path, runs: list[dict[str, Any]]) -> None:
    """The figures of all results there are."""
    from benchmarks.recall.figures import draw_attention, draw_needles, draw_options

    results = collect(runs)
    if results:
        draw_needles(folder / "recall-needles.png", results)
        draw_attention(folder / "recall-attention.png", results)
        draw_options(folder / "recall-options.png", results)


if __name__ == "__main__":
    raise SystemExit(main())
