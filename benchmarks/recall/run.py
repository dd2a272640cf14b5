"""How well a cache that recalls clusters answers, and what it costs, on this CPU: `python benchmarks/recall/run.py`.

Needles in 4,096 tokens of SmolLM2-135M, asked for after the cache was built, against the budget: recall of clusters,
pages as Quest chooses them, exact top tokens; then times. The code that is scored is the code that is timed. Settings
were chosen on other text and other needles. Every part that was measured is kept in the JSON file, and only what is
missing there runs: remove the file to start afresh. About eight minutes; `--parts options` takes another eight.
"""

import argparse
import inspect
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

from benchmarks.recall.needles import plant
from benchmarks.recall.scoring import prefill, score
from benchmarks.recall.settings import BUDGETS, FULL, OURS, PAGES, PAPER, SETTINGS, TOP, Setting
from benchmarks.recall.tables import attention_table, collect, needle_table, option_table
from benchmarks.recall.tiers import time_tiers
from benchmarks.recall.timing import time_index, time_step
from kvcluster.evaluation.models import load_llama, smollm2_folder
from kvcluster.evaluation.report import Claim, Line, Section, print_sections
from kvcluster.fast import RecallCache

__all__ = ["main"]

RESULTS = Path(__file__).resolve().parent / "results" / "measured.json"
FIGURES = ROOT / "docs" / "figures"
MAIN = (FULL, TOP, OURS, PAPER, PAGES)
PARTS = ("step", "index", "tiers", "needles", "options")


def main() -> int:
    """Measure what is missing, print, draw; the exit status is 0 unless --check finds a target missed."""
    parser = argparse.ArgumentParser(description="Recall of clusters: answers and costs on this CPU.")
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=PARTS,
        default=PARTS[:4],
        metavar="PART",
        help=f"of {', '.join(PARTS)}; not the last",
    )
    parser.add_argument("--json", type=Path, default=RESULTS, metavar="FILE", help="results, kept from run to run")
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
    results = load_results(arguments, console)
    with Progress(console=console, transient=True) as progress:
        measure(arguments, results, progress)
    sections = make_sections(results)
    print_sections(console, sections)
    draw(arguments.figures, results["runs"])
    is_missed = any(not claim.is_met for section in sections for claim in section.claims)
    return 1 if arguments.check and is_missed else 0


def load_results(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    """What the JSON file holds, if it was measured with the same needles and the same defaults of the cache."""
    configuration = {
        "needles": arguments.needles,
        "tokens": arguments.tokens,
        "per_context": arguments.per_context,
        "step_tokens": arguments.step_tokens,
        "torch": torch.__version__,
        "threads": arguments.threads,
        "recall_cache": str(inspect.signature(RecallCache)),
    }
    if arguments.json.exists():
        results = json.loads(arguments.json.read_text())
        if results["configuration"] == configuration:
            return results
        console.print(f"{arguments.json} holds results of another configuration: all is measured afresh")
    return {"configuration": configuration, "runs": [], "times": {}}


def measure(arguments: argparse.Namespace, results: dict[str, Any], progress: Progress) -> None:
    """Fill in what is missing, and write the JSON file after each piece."""

    def bar(name: str, steps: int) -> Callable[[], object]:
        task = progress.add_task(name, total=steps)
        return lambda: progress.advance(task)

    def write() -> None:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")

    begun = time.monotonic()
    budget, rounds = 1_024, 15
    if "step" in arguments.parts and "step" not in results["times"]:
        budget = min(budget, arguments.step_tokens // 2)
        section = time_step(arguments.step_tokens, budget, rounds, bar("attention step", 4 * (rounds + 1)))
        results["times"]["step"] = pack(section)
        write()
    wanted = [setting for setting in SETTINGS if ("needles" if setting.name in MAIN else "options") in arguments.parts]
    budgets = {0, *arguments.budgets}  # 0: the full cache's
    todo = {number: missing(results["runs"], wanted, budgets, number) for number in range(arguments.contexts)}
    parts = [part for part in ("index", "tiers") if part in arguments.parts and part not in results["times"]]
    if not parts and not any(todo.values()):
        return
    model, tokenizer = load_llama(smollm2_folder())
    size = {"n_tokens": arguments.tokens, "n_needles": arguments.per_context}
    for part in parts:
        context = plant(tokenizer, arguments.needles, 0, **size)
        if part == "index":
            section = time_index(model, context, 512, 3, bar("index", 8))
        else:
            section = time_tiers(model, context, 512, 48, bar("tiers", 5 * 49))
        results["times"][part] = pack(section)
        write()
    advance = bar("needles", sum(map(len, todo.values())))
    for number, pairs in todo.items():
        read = None
        for setting, tokens in pairs:
            if time.monotonic() - begun > 60 * arguments.minutes:
                return
            if read is None:
                context = plant(tokenizer, arguments.needles, number, **size)
                read = prefill(model, context)
            made = score(model, context, read, lambda exact, layer: setting.of_layer(exact, layer, tokens))  # noqa: B023
            results["runs"].append({"context": number, "setting": setting.name, "budget": tokens, **vars(made)})
            write()
            advance()


def missing(
    runs: list[dict[str, Any]], settings: list[Setting], budgets: set[int], context: int
) -> list[tuple[Setting, int]]:
    """Settings and budgets that did not run on this context yet."""
    done = {(run["setting"], run["budget"]) for run in runs if run["context"] == context}
    pairs = [(setting, budget) for setting in settings for budget in setting.budgets if budget in budgets]
    return [(setting, budget) for setting, budget in pairs if (setting.name, budget) not in done]


def pack(section: Section) -> dict[str, Any]:
    """A section as JSON, from which `unpack` makes it again."""
    lines = [
        {"cells": line.cells, "claim": line.claim and vars(line.claim), "show": line.show} for line in section.lines
    ]
    return {**vars(section), "lines": lines}


def unpack(packed: dict[str, Any]) -> Section:
    lines = [
        Line(tuple(line["cells"]), line["claim"] and Claim(**line["claim"]), line["show"]) for line in packed["lines"]
    ]
    return Section(**{**packed, "lines": lines})


def make_sections(results: dict[str, Any]) -> list[Section]:
    found = collect(results["runs"])
    sections = [needle_table(found), attention_table(found), option_table(found)] if found else []
    return [section for section in sections if section.lines] + [unpack(each) for each in results["times"].values()]


def draw(folder: Path, runs: list[dict[str, Any]]) -> None:
    """The figures, of what there is."""
    from benchmarks.recall.figures import draw_attention, draw_needles, draw_options

    found = collect(runs)
    if found:
        draw_needles(folder / "recall-needles.png", found)
        draw_attention(folder / "recall-attention.png", found)
        draw_options(folder / "recall-options.png", found)


if __name__ == "__main__":
    raise SystemExit(main())
