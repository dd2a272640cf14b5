"""kvpress on the contexts, needles and texts of `kvcluster eval`, at the same stored entries: `make bench-peers`.

Runs beside the torch of .venv with the packages of requirements/peers.txt, which has the last transformers that kvpress
works with. Presses are scored by the functions that score our own methods, and results have the same format. Every run
is kept in the file of results as sums of its context, and only what is missing there runs. A context is read once for
all presses and ratios.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # of a script only its own folder is on the path

import torch
from rich.progress import Progress
from transformers.utils.logging import disable_progress_bar

from benchmarks.peers.compressing import compress, read_context
from benchmarks.peers.presses import PRESSES
from benchmarks.quality.cases import add_case_arguments, cases_of
from kvcluster.evaluation.models import load_llama, smollm2_folder
from kvcluster.evaluation.quality import Case
from kvcluster.evaluation.quality.scoring import following_nll, score_needles
from kvcluster.evaluation.runs import Runs, condense
from kvcluster.fast.huggingface.saving import fingerprint

__all__ = ["main"]

RESULTS = Path(__file__).resolve().parent / "results"
FULL = "full (in kvpress's environment)"


def main() -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description="kvpress's presses on the needles and texts of kvcluster eval.")
    parser.add_argument("--presses", nargs="+", default=list(PRESSES), choices=PRESSES, metavar="NAME")
    add_case_arguments(parser)
    parser.add_argument(
        "--json", type=Path, default=RESULTS / "runs.jsonl", metavar="FILE", help="kept from run to run"
    )
    parser.add_argument("--made", type=Path, default=RESULTS / "presses.json", metavar="FILE", help="presses as code")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    disable_progress_bar()
    model, tokenizer = load_llama(smollm2_folder())
    cases = cases_of(arguments, tokenizer)
    presses = {name: described(press.make(1 - max(arguments.keep))) for name, press in PRESSES.items()}
    arguments.made.write_text(json.dumps(presses, indent=1) + "\n")
    runs = Runs(arguments.json, condense)
    with Progress() as progress:
        task = progress.add_task("kvpress", total=len(cases) * (1 + len(arguments.presses)))
        for case in cases:
            for _ in run_case(model, case, runs, arguments.presses, arguments.keep):
                progress.advance(task)


def run_case(model: Any, case: Case, runs: Runs, names: list[str], keeps: list[float]) -> Any:
    """Add the missing runs to `runs`: one step for the full cache and one for each press."""
    context = None
    shared = {"case": case.fingerprint, "model": fingerprint(model)["weights"]}
    shared |= {"is_stepwise": False, "has_attention_error": False}
    for name in (FULL, *names):
        method = name if name == FULL else f"kvpress {name}"
        keys = [{"method": method, "keep": keep, **shared} for keep in ([1.0] if name == FULL else keeps)]
        missing = [key for key in keys if runs.found(key) is None]
        if missing and context is None:
            context = read_context(model, case.tokens)
        if missing and name == FULL:
            runs.add(measure(model, context.cache, case, missing[0], seconds=0.0))
        elif missing:
            torch.manual_seed(case.number)  # of presses that draw
            begun = time.perf_counter()
            presses = [PRESSES[name].make(1 - key["keep"]) for key in missing]
            caches = compress(model, presses, context, needs_weights=PRESSES[name].needs_weights)
            seconds = (time.perf_counter() - begun) / len(missing)
            for key, cache in zip(missing, caches, strict=True):
                runs.add(measure(model, cache, case, key, seconds=seconds))
        yield


def measure(model: Any, cache: Any, case: Case, key: dict[str, Any], *, seconds: float) -> dict[str, Any]:
    """What a cache stores and answers; `seconds` it took to compress."""
    n_stored = [layer.keys.shape[-2] for layer in cache.layers]
    nbytes = sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))
    if max(n_stored) > key["keep"] * len(case.tokens):
        raise RuntimeError(f"{key['method']} must store {key['keep']:g} of {len(case.tokens)} entries, got {n_stored}")
    begun = time.perf_counter()
    scores = score_needles(model, cache, case.needles, nbytes=nbytes)
    nll = following_nll(model, cache, case.following)
    asking = time.perf_counter() - begun
    return {
        "key": key,
        "task": case.task,
        "n_tokens": len(case.tokens),
        "n_stored": n_stored,
        "nbytes": nbytes,
        "needles": [
            {
                "kind": needle.kind,
                "depth": round(needle.depth, 4),
                "is_right": score.is_right,
                "nll": rounded(score.nll),
            }
            for needle, score in zip(case.needles, scores, strict=True)
        ],
        "following_nll": rounded(nll),
        "seconds": {"clustering": round(seconds, 3), "asking": round(asking, 2)},
    }


def described(press: Any) -> str:
    """A press with its settings, as code."""
    is_plain = type(press).__repr__ is object.__repr__
    return f"{type(press).__name__}({press.press!r})" if is_plain else repr(press)


def rounded(numbers: list[float]) -> list[float]:
    return [round(number, 4) for number in numbers]


if __name__ == "__main__":
    main()
