"""What is left of longer contexts, of two models: `make bench-lengths`, docs/lengths.md.

Needles, perplexity and RULER-style tasks at each length, the question after the compression, through
`kvcluster.evaluation.quality`. Every run is kept as sums of its context, and only what is missing there runs: after a
change to a method, remove its lines.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # of a script only its own folder is on the path

import torch
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import Progress
from transformers.utils.logging import disable_progress_bar

from benchmarks.lengths.variants import RECALL, VARIANTS
from benchmarks.published.run import without_texts
from benchmarks.published.tables import NUMBERS, TITLES, over, score, share_of_bytes
from kvcluster.evaluation.models import load_model
from kvcluster.evaluation.pages import fill, table
from kvcluster.evaluation.quality import Case, needle_cases, run_all, summarize, task_case
from kvcluster.evaluation.quality.methods import METHODS
from kvcluster.evaluation.quality.tasks import TASKS
from kvcluster.evaluation.report import with_interval
from kvcluster.evaluation.runs import Runs
from kvcluster.evaluation.texts import built_in_text, encode
from kvcluster.fast.huggingface.hooks import MODEL_TYPES

__all__ = ["main", "make_tables"]

HERE = Path(__file__).resolve().parent
PAGE = ROOT / "docs" / "lengths.md"
N_FOLLOWING = 512
PARTS = "reporting", "tuning"
SHARES = (0.25, 0.1)
BUDGETS = (1024, 2048)
TITLES_OF_METHODS = {
    "full": "full cache, as it is",
    "distinctive": "distinctive matching, all heads alike",
    "distinctive-heads": "distinctive matching, the model's profile",
    "profile-fixed": "... its shares, 252 recent tokens",
    "profile-fifth": "... its shares, a fifth recent",
    "alike-fifth": "all heads alike, a fifth recent",
    "alike-1000": "all heads alike, chunks of about 1,000",
    "recall": "recall",
    "recall-heads": "recall, each query head its own",
    "clusterkv": "recall, ClusterKV's settings",
}
LEAST_OF_TASKS = 512  # entries: lists have tokens to spare, which stay exact, beside sinks and recent ones
OF_BUDGETS = "recall", "recall-heads", "clusterkv"  # they store every token: what they keep is what a step may read


class Set(NamedTuple):
    """Contexts of one length, with needles, and one of each task; shares that are kept, and budgets of recall."""

    n_tokens: int
    n_contexts: int
    tasks: tuple[str, ...] = TASKS
    shares: tuple[float, ...] = SHARES
    budgets: tuple[int, ...] = ()


# At 4,096 tokens also what `keep_ratio` of 0.25 and 0.1 make of them, with 256 exact tokens beside the chunks.
SHORT = Set(4096, 4, shares=(0.297, 0.25, 0.156, 0.1))
# Of the others Gemma, a base model, knows nothing at 4,096 tokens.
KNOWN = "single", "multi-value", "multi-query", "common words"
# Gemma has 32,768 positions, which have to hold the questions and answers too.
SETS = {
    "smollm2": (SHORT,),
    "gemma3-270m": (SHORT, Set(16384, 2, KNOWN, SHARES, BUDGETS), Set(32000, 1, KNOWN, SHARES, BUDGETS)),
}


def main() -> None:
    """Measure what is missing, fill in the page, print its tables."""
    parser = argparse.ArgumentParser(description="Longer contexts: docs/lengths.md.")
    parser.add_argument("--models", nargs="+", default=tuple(SETS), choices=tuple(SETS))
    parser.add_argument("--longest", type=int, default=32000, help="tokens of the longest contexts that are read")
    parser.add_argument(
        "--part", choices=PARTS, default=PARTS[0], help="of the text; settings are chosen on the latter"
    )
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--page-only", action="store_true", help="measure nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    disable_progress_bar()
    if not arguments.page_only:
        for name in arguments.models:
            model, tokenizer = load_model(name, MODEL_TYPES)
            sets = [each for each in SETS[name] if each.n_tokens <= arguments.longest]
            runs = Runs(results(name, arguments.part), without_texts)
            measure(model, tokenizer, sets, runs, arguments.part)
    tables = make_tables({name: Runs(results(name, arguments.part)).all for name in SETS})
    if arguments.part == PARTS[0]:
        PAGE.write_text(fill(PAGE.read_text(), tables))
    console = Console()
    for name, markdown in tables.items():
        console.print(f"\n{name}", Markdown(markdown))


def results(name: str, part: str) -> Path:
    return HERE / "results" / (f"{name}.jsonl" if part == PARTS[0] else f"{name}-{part}.jsonl")


def measure(model: Any, tokenizer: Any, sets: list[Set], runs: Runs, part: str) -> None:
    """Every method on every context of a part of the text; of tasks those of the longest contexts first."""
    text = built_in_text()
    tokens = encode(tokenizer, text)
    work: list[tuple[Set, list[Case], int]] = []
    for each in sets:
        sizes = {"lengths": [each.n_tokens], "n_contexts": each.n_contexts, "n_following": N_FOLLOWING}
        work.append((each, needle_cases(tokenizer, tokens, part, **sizes), 0))
    for each in reversed(sets):
        cases = [task_case(name, tokenizer, text, tokens, part, 0, each.n_tokens) for name in each.tasks]
        work.append((each, cases, LEAST_OF_TASKS))
    with Progress() as progress:
        for each, cases, least in work:
            pairs = pairs_of(each, least)
            what = f"{each.n_tokens:,} tokens, {'tasks' if least else 'needles'}"
            bar = progress.add_task(what, total=len(cases) * len(pairs))
            run_all(
                model,
                tokenizer,
                cases,
                pairs,
                runs,
                methods=METHODS | VARIANTS | RECALL,
                on_run=lambda bar=bar: progress.advance(bar),
            )


def pairs_of(each: Set, least: int) -> list[tuple[str, float]]:
    """Methods and what they keep, at least so many entries; variants of needles alone, for which that is 0."""
    pairs = [("full", 1.0)]
    for name in TITLES_OF_METHODS:
        if name in OF_BUDGETS:
            pairs += [(name, budget / each.n_tokens) for budget in each.budgets]
        elif name in VARIANTS:
            pairs += [] if least else [(name, SHARES[0])]
        elif name != "full":
            pairs += [(name, share) for share in each.shares if share * each.n_tokens >= least]
    return pairs


def make_tables(by_model: dict[str, list[dict[str, Any]]]) -> dict[str, str]:
    """Each as Markdown."""
    return {name: model_table(name, runs) for name, runs in by_model.items()}


def model_table(name: str, runs: list[dict[str, Any]]) -> str:
    """A row for each length, share kept and method, over the full cache's; what was not run is left out."""
    rows = []
    for n_tokens, *_ in SETS[name]:
        of_length = [run for run in runs if abs(run["n_tokens"] - n_tokens) <= n_tokens // 10]  # lists are shorter
        full = [run for run in of_length if run["key"]["method"] == "full"]
        for method, keep in sorted(
            dict.fromkeys((run["key"]["method"], run["key"]["keep"]) for run in of_length), key=order
        ):
            group = [run for run in of_length if (run["key"]["method"], run["key"]["keep"]) == (method, keep)]
            if of(group, "needles") == of(full, "needles"):
                kept = f"{keep * n_tokens:,.0f} read" if method in OF_BUDGETS else "all" if keep == 1 else f"{keep:g}"
                rows.append([f"{n_tokens:,}", kept, *row(method, group, full, NUMBERS[name])])
    head = ["tokens", "kept", "method", "entries", "bytes", "needles", "perplexity", "tasks"]
    return f"{TITLES[name]}:\n\n" + table(head, rows)


def order(pair: tuple[str, float]) -> tuple[int, float]:
    """Of rows: methods as they are listed, what is kept from much to little."""
    method, keep = pair
    return tuple(TITLES_OF_METHODS).index(method), -keep


def of(runs: list[dict[str, Any]], kind: str) -> set[str]:
    """The cases of `runs` that have needles, or prompts."""
    return {run["key"]["case"] for run in runs if kind in run}


def row(method: str, group: list[dict[str, Any]], full: list[dict[str, Any]], numbers: int) -> list[str]:
    """Method, entries, bytes, needles and perplexity over the full cache's, score of tasks over its."""
    with_needles = [run for run in group if "needles" in run]
    summaries = summarize([*(run for run in full if "needles" in run), *with_needles])
    summary = summaries[-1] if method != "full" else summaries[0]
    has_tasks = bool(of(full, "prompts")) and of(group, "prompts") == of(full, "prompts")
    if method == "full":
        cells = [
            with_interval(summary["needles"]["token_accuracy"], to="-"),
            f"{summary['perplexity']['value']['value']:.3f}",
        ]
        return [TITLES_OF_METHODS[method], "1.000", "1.000", *cells, f"{score(full):.2f}" if has_tasks else "-"]
    needles, perplexity = summary["needles"]["of_full"], summary["perplexity"]["of_full"]
    cells = [with_interval(needles, to="-"), with_interval(perplexity, to="-")]
    cells.append(over(score(group), score(full)) if has_tasks else "-")
    stored = [f"{summary['entries']:.3f}", f"{share_of_bytes(with_needles, full, numbers):.3f}"]
    return [TITLES_OF_METHODS[method], *stored, *cells]


if __name__ == "__main__":
    main()
