"""kvpress on the contexts, needles and texts of `kvcluster eval`, at the same stored entries: `make bench-peers`.

Runs beside the torch of .venv with the packages of requirements/peers.txt, which has the last transformers that kvpress
works with. Presses are scored by the functions that score our own methods, and results have the same format. Every run
is kept in the file of results as sums of its context, and only what is missing there runs. A context is read once for
all presses and ratios.

With `--both-settings` a press is also given context and question, as it would be with the question in the prompt, anew
for each needle; the question is read once for all presses and ratios. Results go into a file of their own, and the
presses are by default those that papers compare with.

With `--rereading` presses run that read the context again, and nothing is freed: see `rereading.py`.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # of a script only its own folder is on the path

import torch
from rich.progress import Progress
from transformers.cache_utils import Cache
from transformers.utils.logging import disable_progress_bar

from benchmarks.peers.compressing import Context, Prompt, compress, read_context, read_question
from benchmarks.peers.measuring import measure, measure_question_first
from benchmarks.peers.presses import COMPARED, IN_BITS, PRESSES
from benchmarks.peers.rereading import REREADING, hidden_from_questions, read_again
from benchmarks.quality.cases import add_case_arguments, cases_of
from kvcluster.evaluation.models import load_model
from kvcluster.evaluation.quality import Case
from kvcluster.evaluation.runs import Runs, condense
from kvcluster.fast.huggingface.fingerprints import weights_digest
from kvcluster.fast.huggingface.hooks import MODEL_TYPES

__all__ = ["main"]

RESULTS = Path(__file__).resolve().parent / "results"
MODELS = "smollm2", "gemma3-270m"
FULL = "full (in kvpress's environment)"


def main() -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description="kvpress's presses on the needles and texts of kvcluster eval.")
    parser.add_argument("--presses", nargs="+", choices=[*PRESSES, *REREADING], metavar="NAME")
    parser.add_argument("--both-settings", action="store_true", help="compress after each question too")
    parser.add_argument("--bits", type=int, metavar="N", help="quantize what is left as KIVI would")
    parser.add_argument("--model", choices=MODELS, default=MODELS[0], help="gemma3-270m: the question later")
    parser.add_argument("--rereading", action="store_true", help="presses that read the context again instead")
    add_case_arguments(parser)
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="kept from run to run: results/runs.jsonl or both-settings.jsonl"
    )
    parser.add_argument("--made", type=Path, default=RESULTS / "presses.json", metavar="FILE", help="presses as code")
    arguments = parser.parse_args()
    if arguments.both_settings and arguments.bits is not None:
        parser.error("--bits is for the question later: not with --both-settings")
    is_first_model = arguments.model == MODELS[0]
    if not is_first_model and (arguments.both_settings or arguments.rereading):
        parser.error(f"--both-settings and --rereading are for {MODELS[0]}")
    known = REREADING if arguments.rereading else PRESSES
    if unknown := [name for name in arguments.presses or () if name not in known]:
        parser.error(f"--presses must be of {', '.join(known)}, got {unknown[0]}")
    torch.set_num_threads(arguments.threads)
    disable_progress_bar()
    model, tokenizer = load_model(arguments.model, MODEL_TYPES)
    cases = cases_of(arguments, tokenizer)
    if arguments.rereading:
        runs = Runs(arguments.json or RESULTS / "rereading.jsonl", condense)
        with Progress() as progress:
            names = arguments.presses or list(REREADING)
            task = progress.add_task("kvpress, reading again", total=len(cases) * (1 + len(names)))
            for case in cases:
                for _ in run_case_rereading(model, tokenizer, case, runs, names, arguments.keep):
                    progress.advance(task)
        return
    if is_first_model:
        presses = {name: described(press.make(1 - max(arguments.keep))) for name, press in PRESSES.items()}
        arguments.made.write_text(json.dumps(presses, indent=1) + "\n")
    is_both, bits = arguments.both_settings, arguments.bits
    every = PRESSES if is_first_model else COMPARED
    names = arguments.presses or list(COMPARED if is_both else every if bits is None else IN_BITS)
    file = "both-settings" if is_both else "runs" if bits is None else "bits"
    file += "" if is_first_model else f"-{arguments.model}"
    runs = Runs(arguments.json or RESULTS / f"{file}.jsonl", condense)
    with Progress() as progress:
        task = progress.add_task("kvpress", total=len(cases) * (1 + len(names)) * (1 + is_both))
        for case in cases:
            for _ in run_case(model, case, runs, names, arguments.keep, bits):
                progress.advance(task)
            if is_both:
                for _ in run_case_question_first(model, case, runs, names, arguments.keep):
                    progress.advance(task)


def run_case(
    model: Any, case: Case, runs: Runs, names: list[str], keeps: list[float], bits: int | None = None
) -> Iterator[None]:
    """Add the missing runs to `runs`: one step for the full cache and one for each press."""
    context, shared = None, shared_key(model, case)
    for name in (FULL, *names):
        missing = missing_keys(runs, name, keeps, shared, bits)
        if missing and context is None:
            context = read_context(model, case.tokens)
        if missing and name == FULL:
            runs.add(measure(model, context.cache, case, missing[0], seconds=0.0))
        elif missing:
            caches, seconds = compress_all(model, name, missing, [context], seed=case.number)
            for key, [cache] in zip(missing, caches, strict=True):
                runs.add(measure(model, cache, case, key, seconds=seconds, bits=bits))
        yield


def run_case_question_first(model: Any, case: Case, runs: Runs, names: list[str], keeps: list[float]) -> Iterator[None]:
    """As `run_case`, with each needle's question in the prompt. The text that follows has none and is left out."""
    case = replace(case, following=[])
    prompts, shared = None, shared_key(model, case) | {"is_question_first": True}
    for name in (FULL, *names):
        missing = missing_keys(runs, name, keeps, shared)
        if missing and prompts is None:
            context = read_context(model, case.tokens)
            prompts = [read_question(model, context, needle.question) for needle in case.needles]
        if missing and name == FULL:
            caches, seconds = [[prompt.full() for prompt in prompts]], 0.0
        elif missing:
            caches, seconds = compress_all(model, name, missing, prompts, seed=case.number)
        for key in missing:  # each key's caches are used up and go
            runs.add(measure_question_first(model, caches.pop(0), prompts, case, key, seconds=seconds))
        yield


def run_case_rereading(
    model: Any, tokenizer: Any, case: Case, runs: Runs, names: list[str], keeps: list[float]
) -> Iterator[None]:
    """As `run_case`, of presses that read the context again."""
    shared = shared_key(model, case)
    for key in missing_keys(runs, FULL, keeps, shared):
        runs.add(measure(model, read_context(model, case.tokens).cache, case, key, seconds=0.0))
    yield
    for name in names:
        for key in missing_keys(runs, name, keeps, shared):
            begun = time.perf_counter()
            hidden = read_again(model, tokenizer, REREADING[name](1 - key["keep"]), case.tokens)
            seconds = time.perf_counter() - begun
            with hidden_from_questions(model, hidden):
                runs.add(measure(model, hidden.cache, case, key, seconds=seconds, n_kept=hidden.n_kept))
        yield


def shared_key(model: Any, case: Case) -> dict[str, Any]:
    """What the keys of all runs of a case have in common."""
    shared = {"case": case.fingerprint, "model": weights_digest(model)}
    return shared | {"is_stepwise": False, "has_attention_error": False}


def missing_keys(
    runs: Runs, name: str, keeps: list[float], shared: dict[str, Any], bits: int | None = None
) -> list[dict[str, Any]]:
    """Keys of a press, or of the full cache, that are not in `runs`."""
    method = name if name == FULL else f"kvpress {name}" + ("" if bits is None else f" in {bits} bits")
    keys = [{"method": method, "keep": keep, **shared} for keep in ([1.0] if name == FULL else keeps)]
    return [key for key in keys if runs.found(key) is None]


def compress_all(
    model: Any, name: str, keys: list[dict[str, Any]], read: Sequence[Context | Prompt], *, seed: int
) -> tuple[list[list[Cache]], float]:
    """For each key the cache of a press of each of `read`, and the seconds that one took, on average."""
    torch.manual_seed(seed)  # of presses that draw
    begun, press = time.perf_counter(), PRESSES[name]
    caches = [
        compress(model, [press.make(1 - key["keep"]) for key in keys], each, needs_weights=press.needs_weights)
        for each in read
    ]
    seconds = (time.perf_counter() - begun) / (len(keys) * len(read))
    return [list(of_key) for of_key in zip(*caches, strict=True)], seconds


def described(press: Any) -> str:
    """A press with its settings, as code."""
    is_plain = type(press).__repr__ is object.__repr__
    return f"{type(press).__name__}({press.press!r})" if is_plain else repr(press)


if __name__ == "__main__":
    main()
