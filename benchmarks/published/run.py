"""The published methods in the setting they were published in, and in the harder one: `make bench-published`.

Runs the published methods and ours through `kvcluster.evaluation.quality` on both real models, and fills in the tables
of docs/published.md, whose sentences are written by hand. Every run is kept as sums of its context, and only what is
missing there runs: after a change to a method, remove its lines.
"""

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRITON_INTERPRET", "1")

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # of a script only its own folder is on the path

import torch
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import Progress
from transformers.utils.logging import disable_progress_bar

from benchmarks.published.agreement import agreement_table, measure_agreement
from benchmarks.published.constants import constants_table, measure_constants
from benchmarks.published.layers import layers_table, measure_layers
from benchmarks.published.tables import ROWS, make_tables
from kvcluster.evaluation.models import load_model
from kvcluster.evaluation.pages import fill
from kvcluster.evaluation.quality import Case, Options, needle_cases, run_all, task_case
from kvcluster.evaluation.quality.methods import METHODS
from kvcluster.evaluation.runs import Runs, condense
from kvcluster.evaluation.texts import built_in_text, encode
from kvcluster.fast.huggingface.hooks import MODEL_TYPES

__all__ = ["main"]

HERE = Path(__file__).resolve().parent
PAGE = ROOT / "docs" / "published.md"
MODELS = ("smollm2", "gemma3-270m")
KEEPS = (0.5, 0.25, 0.2)
BESIDE = (("chelsea", 0.24), ("chelsea-10", 0.28), ("chunked-10", 0.28))  # a fifth in the other heads
TASKS = ("single", "multi-key", "multi-query")


def main() -> None:
    """Measure what is missing, fill in the page, print its tables."""
    parser = argparse.ArgumentParser(description="The published methods in both settings: docs/published.md.")
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--contexts", type=int, default=4, help="with needles; half as many of each task")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--page-only", action="store_true", help="measure nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    disable_progress_bar()
    if not arguments.page_only:
        for name in arguments.models:
            model, tokenizer = load_model(name, MODEL_TYPES)
            measure_agreement(name, model, tokenizer, Runs(results("agreement")), n_tokens=arguments.tokens)
            measure_model(model, tokenizer, Runs(results(name), without_texts), arguments.contexts, arguments.tokens)
            sizes = {"n_contexts": (arguments.contexts + 1) // 2, "n_tokens": arguments.tokens}
            if name == "smollm2":
                measure_constants(model, tokenizer, Runs(results("constants")), **sizes)
            if name == "gemma3-270m":
                measure_layers(model, tokenizer, Runs(results("layers")), **sizes)
    by_model = {name: Runs(results(name)).all for name in MODELS}
    tables = make_tables(by_model)
    tables |= {"constants": constants_table(Runs(results("constants")).all)}
    tables |= {"layers": layers_table(Runs(results("layers")).all)}
    tables |= {"agreement": agreement_table(Runs(results("agreement")).all)}
    PAGE.write_text(fill(PAGE.read_text(), tables))
    console = Console()
    for name, table in tables.items():
        console.print(f"\n{name}", Markdown(table))


def without_texts(run: dict[str, Any]) -> dict[str, Any]:
    """A condensed run; of what was generated, the scores, and of needles no depths."""
    condensed = condense(run)
    if "needles" in condensed:
        condensed["needles"] = {"kinds": condensed["needles"]["kinds"]}
    prompts = [{name: prompt[name] for name in ("metric", "score")} for prompt in condensed.get("prompts", ())]
    return {**condensed, "prompts": prompts} if prompts else condensed


def results(name: str) -> Path:
    return HERE / "results" / f"{name}.jsonl"


def measure_model(model: Any, tokenizer: Any, runs: Runs, n_contexts: int, n_tokens: int) -> None:
    """Both settings: needles and tasks in each, the text that follows once."""
    text = built_in_text()
    tokens = encode(tokenizer, text)
    planted = needle_cases(tokenizer, tokens, "reporting", lengths=[n_tokens], n_contexts=n_contexts, n_following=256)
    asked = [
        task_case(task, tokenizer, text, tokens, "reporting", number, n_tokens)
        for task in TASKS
        for number in range((n_contexts + 1) // 2)
    ]
    pairs = possible(model, [("full", 1.0), *((name, keep) for name in ROWS for keep in KEEPS), *BESIDE], n_tokens)
    with Progress() as progress:
        for is_first in (True, False):
            cases: list[Case] = [*(without_text(case, is_first) for case in planted), *asked]
            label = "Question first" if is_first else "Question later"
            task = progress.add_task(label, total=len(cases) * len(pairs))
            run_all(
                model,
                tokenizer,
                cases,
                pairs,
                runs,
                options=Options(is_question_first=is_first),
                on_run=lambda task=task: progress.advance(task),  # type: ignore[misc]
            )


def without_text(case: Case, is_first: bool) -> Case:
    """The text that follows has no question: it is measured in the other setting."""
    return replace(case, following=[]) if is_first else case


def possible(model: Any, pairs: list[tuple[str, float]], n_tokens: int) -> list[tuple[str, float]]:
    """Those that the model can keep so little by: with one KV head of three whole, a quarter is not enough."""
    can = []
    for name, keep in pairs:
        try:
            METHODS[name].make(model, keep, n_tokens)
        except ValueError:
            continue
        can.append((name, keep))
    return can


if __name__ == "__main__":
    main()
