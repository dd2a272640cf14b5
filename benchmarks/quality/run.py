"""What our methods keep of a context beside kvpress's presses at the same entries: `make bench-quality`.

Runs our methods through `kvcluster.evaluation.quality`, reads what `make bench-peers` found, and fills in the tables of
QUALITY.md, whose sentences are written by hand, and its figures. Every run is kept in a file as sums of its context,
and only what is missing there runs: after a change to a method, remove its lines.
"""

import argparse
import ast
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # of a script only its own folder is on the path

import torch
from rich.console import Console
from rich.progress import Progress
from transformers.utils.logging import disable_progress_bar

from benchmarks.quality.cases import add_case_arguments, cases_of
from benchmarks.quality.cells import PEER
from benchmarks.quality.results import Results, collect
from benchmarks.quality.tables import Facts, make_tables
from benchmarks.quality.timing import time_compression
from kvcluster.evaluation.models import load_llama, smollm2_folder
from kvcluster.evaluation.pages import fill
from kvcluster.evaluation.quality import run_all
from kvcluster.evaluation.runs import Runs, condense

__all__ = ["main", "read_results"]

HERE = Path(__file__).resolve().parent
PEERS, PUBLISHED = HERE.parent / "peers", HERE.parent / "published"
OURS = ("chunked", "distinctive", "distinctive-heads", "attended")
TIMED_KEEP = 0.25


def main() -> None:
    """Measure what is missing, write, draw."""
    parser = argparse.ArgumentParser(description="Our methods beside kvpress's presses: benchmarks/quality/QUALITY.md.")
    parser.add_argument("--methods", nargs="+", default=OURS, choices=OURS)
    add_case_arguments(parser)
    parser.add_argument("--rounds", type=int, default=5, help="of timing")
    parser.add_argument("--page-only", action="store_true", help="measure nothing")
    parser.add_argument("--runs", type=Path, default=HERE / "results" / "runs.jsonl", metavar="FILE")
    parser.add_argument("--times", type=Path, default=HERE / "results" / "times.json", metavar="FILE")
    parser.add_argument("--peers", type=Path, default=PEERS / "results" / "runs.jsonl", metavar="FILE")
    parser.add_argument("--page", type=Path, default=HERE / "QUALITY.md", metavar="FILE")
    parser.add_argument("--figures", type=Path, default=ROOT / "docs" / "figures", metavar="FOLDER")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    console = Console(width=None if sys.stdout.isatty() else 160)
    if not arguments.page_only:
        measure(arguments, console)
    write(arguments, console)


def measure(arguments: argparse.Namespace, console: Console) -> None:
    """Runs and times that are not in their files."""
    disable_progress_bar()
    model, tokenizer = load_llama(smollm2_folder())
    cases = cases_of(arguments, tokenizer)
    pairs = [("full", 1.0), *((name, keep) for name in arguments.methods for keep in arguments.keep)]
    timed = [(name, TIMED_KEEP) for name in arguments.methods]
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("answers", total=len(cases) * len(pairs))
        run_all(model, tokenizer, cases, pairs, Runs(arguments.runs, condense), on_run=lambda: progress.advance(task))
        if arguments.rounds and not covers(arguments.times, timed):
            task = progress.add_task("times", total=(arguments.rounds + 1) * (1 + len(timed)))
            times = time_compression(model, cases[0].tokens, timed, arguments.rounds, lambda: progress.advance(task))
            arguments.times.write_text(json.dumps(times, indent=1) + "\n")


def covers(path: Path, pairs: list[tuple[str, float]]) -> bool:
    """Whether all of `pairs` have been timed."""
    return path.exists() and {f"{name} {keep:g}" for name, keep in pairs} <= set(
        json.loads(path.read_text())["seconds"]
    )


def write(arguments: argparse.Namespace, console: Console) -> None:
    """The page's tables and its figures, from what is in the files."""
    from benchmarks.quality.figures import draw_depths, draw_frontier

    results, facts = read_results(arguments.runs, arguments.peers, arguments.times)
    arguments.page.write_text(fill(arguments.page.read_text(), make_tables(results, facts)))
    n = results.summaries["full", 1.0]["needles"]["n"]
    title = f"SmolLM2-135M, {n} needles, compressed before they were asked for"
    drawn = [name for name in OURS if any(name == method for method, _ in results.runs)]
    draw_frontier(arguments.figures / "quality-frontier.png", results, drawn, title)
    draw_depths(arguments.figures / "quality-depths.png", results, drawn, title)
    console.print(f"{arguments.page}: {len(results.runs)} rows of {len(results.full)} contexts")


def read_results(
    ours: Path = HERE / "results" / "runs.jsonl",
    peers: Path = PEERS / "results" / "runs.jsonl",
    times: Path = HERE / "results" / "times.json",
) -> tuple[Results, Facts]:
    """What the page is made from, read from files of results."""
    runs = read(ours) + read(peers)
    wanted = {"full", *(run["key"]["method"] for run in runs if run["key"]["method"].startswith(PEER)), *OURS}
    results = collect([run for run in runs if run["key"]["method"] in wanted], OURS)
    done = {name.removeprefix(PEER) for name, _ in results.runs}
    presses = json.loads((PEERS / "results" / "presses.json").read_text())
    facts = Facts(
        ours=list(OURS),
        elsewhere=[run for run in runs if run["key"]["method"].startswith("full (")],
        times=json.loads(times.read_text()) if times.exists() else None,
        presses={name: press for name, press in presses.items() if name in done},
        left_out=left_out(results),
        both=(read(PUBLISHED / "results" / "smollm2.jsonl"), read(PEERS / "results" / "both-settings.jsonl")),
    )
    return results, facts


def read(path: Path) -> list[dict[str, Any]]:
    """The runs in a file, which another process may be writing; none if there is no file."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def left_out(results: Results) -> dict[str, str]:
    """Presses that are not in the tables, and why."""
    tree = ast.parse((PEERS / "presses.py").read_text())  # read as text, since kvpress is not installed here
    [presses] = [
        statement.value
        for statement in tree.body
        if isinstance(statement, ast.Assign) and statement.targets[0].id == "PRESSES"
    ]
    done = {name for name, _ in results.runs}
    missing = [key.value for key in presses.keys if PEER + key.value not in done]
    waiting = (
        {", ".join(missing): "`make bench-peers` runs them, but has not on all of these contexts"} if missing else {}
    )
    return waiting | json.loads((PEERS / "results" / "left-out.json").read_text())


if __name__ == "__main__":
    main()
