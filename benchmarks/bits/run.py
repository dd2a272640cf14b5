"""What is left of a context at equal bytes: fewer entries, fewer bits, or both: `make bench-bits`, docs/bits.md.

Needles and perplexity at 4,096 tokens, and of Gemma at 16,384, the question after the compression, through
`kvcluster.evaluation.quality`. Every run is kept as sums of its context, and only what is missing there runs: after a
change to a method, remove its lines.
"""

import argparse
import importlib.util
import os
import sys
from collections import Counter
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

from benchmarks.bits.figure import draw
from benchmarks.bits.layouts import LAYOUTS, OF_OTHERS
from benchmarks.bits.variants import VARIANTS
from benchmarks.published.run import without_texts
from benchmarks.published.tables import TITLES
from kvcluster.evaluation.models import load_model
from kvcluster.evaluation.pages import fill, table
from kvcluster.evaluation.quality import needle_cases, run_all, summarize
from kvcluster.evaluation.quality.methods import METHODS
from kvcluster.evaluation.report import with_interval
from kvcluster.evaluation.runs import Runs
from kvcluster.evaluation.texts import built_in_text, encode
from kvcluster.fast.huggingface.hooks import MODEL_TYPES

__all__ = ["main", "make_tables"]

HERE = Path(__file__).resolve().parent
PAGE = ROOT / "docs" / "bits.md"
MODELS = "smollm2", "gemma3-270m"
PEERS = dict(zip(MODELS, ("bits.jsonl", "bits-gemma3-270m.jsonl"), strict=True))  # by make bench-peers
SHORT, LONG = 4096, 16384
N_CONTEXTS = {SHORT: 4, LONG: 2}
ALL = METHODS | VARIANTS | LAYOUTS | {name: how for of in OF_OTHERS.values() for name, how in of.items()}
# What is compared, by the number of entries that each may keep.
PACKAGES = {"optimum": "optimum-quanto==0.2.7", "hqq": "hqq==0.2.8.post1", "turboquant": "turboquant==0.2.0"}
BITS_ALONE = [(f"bits-{bits}-few", 1.0) for bits in (8, 4, 3, 2)]
BITS_ALONE += [(name, 1.0) for names in OF_OTHERS.values() for name in names]
ENTRIES_ALONE = [("bits-16", keep) for keep in (0.5, 0.25, 0.1)]
BOTH = [("bits-4-few", keep) for keep in (0.5, 0.33, 0.25, 0.22, 0.2, 0.14)] + [("bits-4", 0.5), ("bits-4", 0.25)]
BOTH += [("bits-3-few", keep) for keep in (0.25, 0.18, 0.14)] + [("bits-2-few", 0.25), ("bits-3-2-few", 0.16)]
BOTH += [("bits-3-middle", 0.25), ("bits-3-long", 0.26)]
OF_LONG = [("bits-4-few", 1.0), ("bits-2-few", 1.0), ("bits-16", 0.25)]
OF_LONG += [("bits-4-few", keep) for keep in (0.5, 0.25)] + [("bits-3-few", keep) for keep in (0.25, 0.15)]
OF_LAYOUTS = [(name, 1.0) for name in ("channels32-4", "channels64-4", "entries-4", "entries-2")]
OF_LAYOUTS += [(f"rotated-{bits}", keep) for bits in (4, 3, 2) for keep in (1.0, 0.25)]
OF_LAYOUTS += [(f"channels32-{bits}", keep) for bits, keep in ((4, 0.25), (3, 0.25), (2, 1.0), (2, 0.25))]
HEAD = ["bytes", "entries", "what", "needles", "perplexity"]
BY_OTHERS = {
    "quanto": "transformers' `QuantizedCache` (optimum-quanto)",
    "hqq": "transformers' `QuantizedCache` (hqq)",
    "turboquant": "the package turboquant",
}
TITLES_OF_ENDS = {
    "": "252 recent tokens, all exact",
    "-few": "252 recent tokens, 32 of them exact",
    "-middle": "124 recent tokens, 32 of them exact; chunks of 128",
    "-long": "508 recent tokens, 32 of them exact",
}


def main() -> None:
    """Measure what is missing, fill in the page, draw the figure, print the tables."""
    parser = argparse.ArgumentParser(description="Bytes, entries and bits: docs/bits.md.")
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--page-only", action="store_true", help="measure nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    disable_progress_bar()
    if not arguments.page_only:
        for name in arguments.models:
            measure(name)
    runs = {name: [*Runs(results(name)).all, *by_peers(name)] for name in MODELS}
    found = {name: summarize([run for run in of if run["n_tokens"] < LONG]) for name, of in runs.items() if of}
    longer = summarize([run for run in runs[MODELS[1]] if run["n_tokens"] >= LONG])
    tables = make_tables(found) | {"longer": longer_table(longer)}
    PAGE.write_text(fill(PAGE.read_text(), tables))
    draw(ROOT / "docs" / "figures" / "bits.png", {TITLES[name]: of_model for name, of_model in found.items()})
    console = Console()
    for name, markdown in tables.items():
        console.print(f"\n{name}", Markdown(markdown))


def by_peers(name: str) -> list[dict[str, Any]]:
    """What kvpress's presses leave, in few bits, of the contexts on which all of them ran."""
    runs = [run for run in Runs(HERE.parent / "peers" / "results" / PEERS[name]).all if "bits" in run["key"]["method"]]
    n_of_case = Counter(run["key"]["case"] for run in runs)
    return [run for run in runs if n_of_case[run["key"]["case"]] == max(n_of_case.values())]


def results(name: str) -> Path:
    return HERE / "results" / f"{name}.jsonl"


def measure(name: str) -> None:
    """Every pair on every context of the half of the text on which nothing was chosen."""
    model, tokenizer = load_model(name, MODEL_TYPES)
    tokens = encode(tokenizer, built_in_text())
    compared = [("full", 1.0), *BITS_ALONE, *ENTRIES_ALONE, *BOTH]
    for package, names in OF_OTHERS.items():
        if importlib.util.find_spec(package) is None:
            compared = [pair for pair in compared if pair[0] not in names]
            Console().print(f"{', '.join(names)} left out: {PACKAGES[package]} is not installed")
    runs = Runs(results(name), without_texts)
    with Progress() as progress:
        work = [("compared", SHORT, compared), ("layouts", SHORT, OF_LAYOUTS)]
        if name == MODELS[1]:
            work.append(("longer", LONG, [("full", 1.0), *OF_LONG]))
        for what, n_tokens, pairs in work:
            sizes: dict[str, Any] = {"lengths": [n_tokens], "n_contexts": N_CONTEXTS[n_tokens], "n_following": 512}
            cases = needle_cases(tokenizer, tokens, "reporting", **sizes)
            bar = progress.add_task(f"{name}, {what}", total=len(cases) * len(pairs))
            run_all(model, tokenizer, cases, pairs, runs, methods=ALL, on_run=lambda bar=bar: progress.advance(bar))


def make_tables(found: dict[str, list[dict[str, Any]]]) -> dict[str, str]:
    """Each as Markdown."""
    tables = {}
    for name, summaries in found.items():
        of = {(each["method"], each["keep"]): each for each in summaries}
        peers = [pair for pair in of if pair[0].startswith("kvpress")]
        compared = [pair for pair in (*BITS_ALONE, *ENTRIES_ALONE, *BOTH, *peers) if pair in of]
        rows = [row(of[pair]) for pair in sorted(compared, key=lambda pair: -of[pair]["of_bfloat16"])]
        tables[name] = f"{TITLES[name]}:\n\n" + table(HEAD, rows)
        layouts = [row(of[pair]) for pair in OF_LAYOUTS if pair in of]
        tables[f"layouts-{name}"] = f"{TITLES[name]}:\n\n" + table(
            ["bytes", "entries", "layout", "needles", "perplexity"], layouts
        )
    return tables


def longer_table(summaries: list[dict[str, Any]]) -> str:
    """What is left of longer contexts, as Markdown."""
    of = {(each["method"], each["keep"]): each for each in summaries}
    found = sorted((of[pair] for pair in OF_LONG if pair in of), key=lambda each: -each["of_bfloat16"])
    return f"{TITLES[MODELS[1]]}, {LONG:,} tokens:\n\n" + table(HEAD, [row(each) for each in found])


def row(summary: dict[str, Any]) -> list[str]:
    """Bytes, entries, what it is, needles and perplexity over the full cache's."""
    scores = [with_interval(summary[part]["of_full"], to="-") for part in ("needles", "perplexity")]
    return [f"{summary['of_bfloat16']:.3f}", f"{summary['entries']:.3f}", title(summary), *scores]


def title(summary: dict[str, Any]) -> str:
    """What a row shows."""
    name, is_all = summary["method"], summary["keep"] == 1.0
    if name.startswith("kvpress"):
        n_contexts = summary["n_contexts"]
        return name if n_contexts == N_CONTEXTS[SHORT] else f"{name}, {n_contexts} contexts"
    if name.split("-")[0] in BY_OTHERS:
        return f"all tokens, {name[-1]} bits by {BY_OTHERS[name.split('-')[0]]}"
    if name in LAYOUTS:
        kind, _, bits = name.partition("-")
        kinds = {"entries": "keys and values by entry", "rotated": "rotated, best levels"}
        kinds |= {f"channels{n}": f"KIVI's, groups of {n}" for n in (32, 64)}
        return f"{kinds[kind]}, {bits} bits" + (", all tokens" if is_all else ", clustered")
    bits = "-".join(part for part in name.split("-")[1:] if part.isdigit())
    if bits == "16":
        return "clustered, exact"
    said = f"keys {bits[0]}, values {bits[-1]} bits" if "-" in bits else f"{bits} bits"
    end = name.removeprefix(f"bits-{bits}")
    return f"all tokens but 32, {said}" if is_all else f"clustered, {said}; {TITLES_OF_ENDS[end]}"


if __name__ == "__main__":
    main()
