"""What each ingredient of distinctive matching is worth: `python benchmarks/ablation/run.py`, on the tuning set alone.

The same budget throughout, one ingredient changed at a time. The row of what is shipped is the package's own cache; all
other rows are of `variants.py`, plain torch, whose default decides the same. Every run is kept in a file as sums of its
context, and only what is missing there runs: after a change to a method, remove its lines. Twenty minutes; `--kind
words` asks for words instead of numbers, of what is shipped alone.
"""

import argparse
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # of a script only its own folder is on the path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers.utils.logging import disable_progress_bar

from benchmarks.ablation.layer_ratios import distinctive_layers
from benchmarks.ablation.packed_scoring import Context, Held, exact, following_nll, read_contexts, score
from benchmarks.ablation.variants import PANELS, Settings, compress_layers, describe
from kvcluster.evaluation.models import load_llama, smollm2_folder
from kvcluster.evaluation.quality import METHODS
from kvcluster.evaluation.quality.scoring import fill
from kvcluster.evaluation.report import with_interval
from kvcluster.evaluation.runs import Runs, needle_sums, stored_sums, total
from kvcluster.evaluation.statistics import estimate, exp_ratio_of_sums

__all__ = ["main"]

HERE = Path(__file__).resolve().parent
SHIPPED = "distinctive-layers"  # what was shipped when this was measured; profiles share out by head since
N_ROUNDS = 3  # of timing
OWN = ("full", SHIPPED, "distinctive")  # rows of the package itself
SETTINGS = {describe(settings): settings for panel in PANELS.values() for settings in panel.values()}
SAME = {"default": SHIPPED, "share_out=alike": "distinctive"}  # only their needles are scored, as a check


def main() -> None:
    """Measure what is missing, print, draw."""
    parser = argparse.ArgumentParser(description="What each ingredient of distinctive matching is worth.")
    parser.add_argument("--keep", nargs="+", type=float, default=[0.2, 0.25], metavar="SHARE")
    parser.add_argument("--kind", default="digits", help="of answers: digits, or words for what is shipped alone")
    parser.add_argument("--contexts", type=int, default=4)
    parser.add_argument("--needles", type=int, default=12, help="in each context")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--following", type=int, default=512, help="tokens after each context, for perplexity; or 0")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin nothing more after this long")
    parser.add_argument("--no-measuring", action="store_true", help="print and draw what there is")
    parser.add_argument("--runs", type=Path, default=HERE / "results" / "runs.jsonl", metavar="FILE")
    parser.add_argument(
        "--figure", type=Path, default=ROOT / "docs" / "figures" / "quality-ablation.png", metavar="FILE"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    disable_progress_bar()
    runs = Runs(arguments.runs)
    if not arguments.no_measuring:
        measure(arguments, runs)
    console = Console(width=None if sys.stdout.isatty() else 180)
    results = collect(runs.all, arguments.kind)
    console.print(table_of(results, arguments.keep))
    if arguments.kind == "digits":
        from benchmarks.ablation.figure import draw

        draw(arguments.figure, results, arguments.keep)


def wanted(arguments: argparse.Namespace) -> list[tuple[str, float]]:
    """Variant and share kept of every run."""
    names = [*OWN[1:], *(SETTINGS if arguments.kind == "digits" else ())]
    return [("full", 1.0), *((name, keep) for keep in arguments.keep for name in names)]


def measure(arguments: argparse.Namespace, runs: Runs) -> None:
    begun = time.monotonic()
    console = Console()
    model, tokenizer = load_llama(smollm2_folder())
    sizes = {
        "lengths": [arguments.tokens],
        "n_contexts": arguments.contexts,
        "n_needles": arguments.needles,
        "n_following": arguments.following,
    }
    contexts = read_contexts(model, tokenizer, "tuning", arguments.kind, **sizes)
    if arguments.kind == "digits":
        time_all(model, contexts[0], wanted(arguments)[1:], runs)
    todo = [("needles", *row) for row in wanted(arguments)]
    if arguments.following:
        todo += [("following", *row) for row in wanted(arguments) if row[0] not in SAME]
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("answers", total=len(todo) * len(contexts))
        for part, name, keep in todo:
            for context in contexts:
                if time.monotonic() - begun > 60 * arguments.minutes:
                    return
                key = {"part": part, "variant": name, "keep": keep, "kind": arguments.kind}
                key["case"] = context.case.fingerprint
                if runs.found(key) is None:
                    runs.add({"key": key, **run(model, context, part, name, keep)})
                progress.advance(task)


def time_all(model: Any, context: Context, rows: list[tuple[str, float]], runs: Runs) -> None:
    """The shortest time of each compression, all in turn."""
    keys = [
        {"part": "times", "variant": name, "keep": keep, "kind": "digits", "case": context.case.fingerprint}
        for name, keep in rows
    ]
    if all(runs.found(key) for key in keys):
        return  # else time all again: times of different runs cannot be compared
    seconds = dict.fromkeys(rows, math.inf)
    for _ in range(N_ROUNDS):
        for row in rows:
            begun = time.perf_counter()
            stored(model, context, *row)
            seconds[row] = min(seconds[row], time.perf_counter() - begun)
    for key, least in zip(keys, seconds.values(), strict=True):  # of one row the last counts
        runs.add({"key": key, "seconds": round(least, 4)})


def run(model: Any, context: Context, part: str, name: str, keep: float) -> dict[str, Any]:
    """How the model answers, or continues the text, from what one variant stores of one context."""
    held = stored(model, context, name, keep)
    n_stored = [layer.counts.shape[1] for layer in held]
    if sum(n_stored) > keep * len(context.case.tokens) * len(held):
        raise RuntimeError(f"{name} must keep {keep} of all tokens, got {sum(n_stored):,} entries")
    if part == "following":
        nll = following_nll(model, context.case, held)
        return {"following": {"n": len(nll), "nll": round(sum(nll), 6)}}
    scores = score(model, context.case, held)
    sums = needle_sums([answer.is_right for answer in scores], [answer.nll for answer in scores])
    return {"stored": stored_sums(n_stored), "needles": sums}


@torch.inference_mode()
def stored(model: Any, context: Context, name: str, keep: float) -> list[Held]:
    """What a variant stores of a context; for the package's own rows, what its cache stores."""
    if name == "full":
        return exact(context.read)
    if name not in OWN:
        return compress_layers(context.read, keep, SETTINGS[name])
    make = distinctive_layers if name == SHIPPED else METHODS[name].make
    cache = make(model, keep, len(context.case.tokens))
    caches = [layer.cache.caches[0] for layer in fill(cache, context.full_cache(model.config)).layers]
    return [Held(of_layer.keys[0], of_layer.values[0], of_layer.counts[0]) for of_layer in caches]


Run = dict[str, Any]
Row = tuple[str, float]  # variant, share kept


def collect(runs: list[dict[str, Any]], kind: str) -> dict[Row, dict[str, Any]]:
    """Accuracy, its difference to what is shipped, perplexity ratio and relative time by variant and share kept.

    Rows that did not run on every context of the full cache are left out. All 95 % intervals come from resampling
    contexts with replacement.
    """
    grouped: dict[str, dict[Row, dict[str, Run]]] = {"needles": {}, "following": {}, "times": {}}
    for run in runs:
        key = run["key"]
        if key["kind"] == kind:
            grouped[key["part"]].setdefault((key["variant"], key["keep"]), {})[key["case"]] = run
    cases = list(grouped["needles"]["full", 1.0])
    needles, following = (
        {row: [by_case[case] for case in cases] for row, by_case in of_part.items() if set(cases) <= set(by_case)}
        for of_part in (grouped["needles"], grouped["following"])
    )
    seconds = {row: next(iter(by_case.values()))["seconds"] for row, by_case in grouped["times"].items()}
    results = {}
    for (name, keep), group in needles.items():
        results[name, keep] = needle_summary(group, needles.get((SHIPPED, keep)), needles["full", 1.0])
        results[name, keep]["perplexity"] = None
        scored = SAME.get(name, name), keep
        if scored in following and ("full", 1.0) in following:
            text, full = ([run["following"] for run in following[row]] for row in (scored, ("full", 1.0)))
            differences = [a["nll"] - b["nll"] for a, b in zip(text, full, strict=True)]
            results[name, keep]["perplexity"] = estimate(differences, [run["n"] for run in text], exp_ratio_of_sums)
        plain = describe(Settings()), keep
        has_times = {(name, keep), plain} <= set(seconds)
        results[name, keep]["time"] = seconds[name, keep] / seconds[plain] if has_times else None
    return results


def needle_summary(group: list[Run], shipped: list[Run] | None, full: list[Run]) -> dict[str, Any]:
    right, of_shipped = ([run["needles"]["right"] for run in runs or []] for runs in (group, shipped))
    tokens, sums = [run["needles"]["tokens"] for run in group], total(run["needles"] for run in group)
    differences = [a - b for a, b in zip(right, of_shipped, strict=True)] if shipped else None
    return {
        "entries": n_entries(group) / n_entries(full),
        "accuracy": estimate(right, tokens),
        "of_full": sums["right"] / total(run["needles"] for run in full)["right"],
        "difference": estimate(differences, tokens) if differences else None,
        "exact": sums["exact"] / sums["n"],
        "nll": sums["nll"] / sums["tokens"],
    }


def n_entries(runs: list[Run]) -> int:
    return sum(run["stored"]["entries"] for run in runs)


def table_of(results: dict[Row, dict[str, Any]], keeps: list[float]) -> Table:
    table = Table(title="95 % intervals from resampling contexts; time relative to the default in plain torch")
    for name in ("ingredient", "variant", "keep"):
        table.add_column(name)
    for name in ("stored", "token accuracy", "less shipped", "exact", "nats", "perplexity / full", "time"):
        table.add_column(name, justify="right")
    for keep in (1.0, *keeps):
        for name in OWN:
            if (name, keep) in results:
                table.add_row("the package", name, f"{keep:g}", *cells(results[name, keep]))
    for panel, variants in PANELS.items():
        table.add_section()
        for keep in keeps:
            for name, settings in variants.items():
                if (describe(settings), keep) in results:
                    star = " *" * (settings == Settings())
                    table.add_row(panel, name + star, f"{keep:g}", *cells(results[describe(settings), keep]))
    return table


def cells(result: dict[str, Any]) -> list[str]:
    return [
        f"{result['entries']:.4f}",
        with_interval(result["accuracy"]),
        with_interval(result["difference"], sign="+"),
        f"{result['exact']:.2f}",
        f"{result['nll']:.3f}",
        with_interval(result["perplexity"]),
        "" if result["time"] is None else f"{result['time']:.2f}",
    ]


if __name__ == "__main__":
    main()
