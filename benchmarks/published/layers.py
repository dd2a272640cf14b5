"""Which of the three layers of Gemma that attend to everything should stay whole: how far whole heads go there."""

from functools import partial
from typing import Any

from rich.progress import Progress

from benchmarks.published.constants import HEAD, measure, over_full, soft_matching
from kvcluster.evaluation.pages import table
from kvcluster.evaluation.quality import needle_cases
from kvcluster.evaluation.quality.reading import Context
from kvcluster.evaluation.runs import Runs
from kvcluster.evaluation.texts import built_in_text, encode
from kvcluster.fast.huggingface.fingerprints import weights_digest

__all__ = ["layers_table", "measure_layers"]

RULE = 0.25, 256, 16  # of each of the two layers that are clustered: share kept, chunk size, sinks


def measure_layers(model: Any, tokenizer: Any, runs: Runs, *, n_contexts: int, n_tokens: int) -> None:
    """Add what is missing: soft matching with each of the layers whole in turn, on contexts of the tuning half."""
    tokens = encode(tokenizer, built_in_text())
    cases = needle_cases(tokenizer, tokens, "tuning", lengths=[n_tokens], n_contexts=n_contexts)
    weights = weights_digest(model)
    full = [layer for layer, kind in enumerate(model.config.layer_types) if kind == "full_attention"]
    with Progress() as progress:
        task = progress.add_task("Whole layers", total=len(cases) * (1 + len(full)))
        for case in cases:
            context = Context(model, case.tokens)
            for layer in (None, *full):
                key = {"part": "layers", "layer": layer, "case": case.fingerprint, "model": weights}
                if runs.found(key) is None:
                    make = None if layer is None else partial(soft_matching, model, *RULE, whole_heads=[(layer, 0)])
                    runs.add({"key": key, **measure(model, context, case, make)})
                progress.advance(task)


def layers_table(runs: list[dict[str, Any]]) -> str:
    """A row for each layer that is whole."""
    groups: dict[int | None, list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault(run["key"]["layer"], []).append(run)
    full = groups.pop(None)
    return table(["whole layer", *HEAD], [[str(layer), *over_full(group, full)] for layer, group in groups.items()])
