"""Every method on every case; a pair that is already in the store is not run again."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from kvcluster.fast.huggingface.report import report_cache
from kvcluster.fast.huggingface.saving import fingerprint

from ..runs import Runs
from .attention_error import attention_errors
from .cases import Case
from .methods import METHODS, Method
from .metrics import METRICS
from .scoring import fill, following_nll, generate, prefill, score_needles

__all__ = ["Options", "check_methods", "run_all"]


@dataclass(frozen=True)
class Options:
    """What is measured besides needles and prompts.

    Attributes
    ----------
    is_stepwise : tokens come one by one, so that what follows the context is clustered too, as in decoding.
    has_attention_error : compare the outputs of attention with those of the full cache, layer by layer.
    """

    is_stepwise: bool = False
    has_attention_error: bool = False


def check_methods(pairs: Iterable[tuple[str, float]]) -> list[tuple[str, float]]:
    """Each method with each of its `keep`, without duplicates: a method that has none is run once, with 1.

    Raises
    ------
    ValueError : an unknown method or none; a `keep` that is not in (0, 1].
    """
    checked = []
    unchecked = list(pairs)
    if not unchecked:
        raise ValueError(f"method must be of {', '.join(METHODS)}, got none")
    for name, keep in unchecked:
        if name not in METHODS:
            raise ValueError(f"method must be of {', '.join(METHODS)}, got {name!r}")
        if not 0 < keep <= 1:
            raise ValueError(f"keep must be in (0, 1], got {keep:g}")
        checked.append((name, keep if METHODS[name].has_keep else 1.0))
    return list(dict.fromkeys(checked))


def run_all(
    model: Any,
    tokenizer: Any,
    cases: list[Case],
    pairs: list[tuple[str, float]],
    runs: Runs,
    *,
    options: Options = Options(),
    on_run: Callable[[], object] = lambda: None,
) -> list[dict[str, Any]]:
    """Results of every pair of method and `keep` on every case, case by case; new ones are added to `runs`.

    Raises
    ------
    ValueError : a method cannot keep so little of a case; nothing has run then.
    RuntimeError : a method stored more entries than `keep` allows.
    """
    for n_tokens in {len(case.tokens) for case in cases}:
        for name, keep in pairs:
            METHODS[name].make(model, keep, n_tokens)
    weights = fingerprint(model)["weights"]
    results = []
    for case in cases:
        context = Context(model, case)
        for name, keep in pairs:
            key = {
                "method": name,
                "keep": keep,
                "case": case.fingerprint,
                "model": weights,
                "is_stepwise": options.is_stepwise or METHODS[name].is_stepwise,
                "has_attention_error": options.has_attention_error,
            }
            result = runs.found(key)
            if result is None:
                result = {"key": key, "task": case.task, "name": case.name, "n_tokens": len(case.tokens)}
                result |= measure(model, tokenizer, context, key)
                result = runs.add(result)
            results.append(result)
            on_run()
    return results


class Context:
    """A case and its full cache, which is computed when it is first needed."""

    def __init__(self, model: Any, case: Case) -> None:
        self.model, self.case = model, case

    @cached_property
    def full(self) -> Any:
        return prefill(self.model, lambda model: None, self.case.tokens)

    def cache(self, method: Method, keep: float) -> Any:
        """The cache of a method after the context."""
        cache = method.make(self.model, keep, len(self.case.tokens))
        if cache is None:
            return self.full
        if method.is_blind and len(cache.own_layers) == len(cache.layers):
            return fill(cache, self.full)
        return prefill(self.model, lambda model: cache, self.case.tokens)


def measure(model: Any, tokenizer: Any, context: Context, key: dict[str, Any]) -> dict[str, Any]:
    """What a method's cache stores and answers, as JSON."""
    case, method, keep, is_stepwise = context.case, METHODS[key["method"]], key["keep"], key["is_stepwise"]
    cache = context.cache(method, keep)
    begun = time.perf_counter()
    report = report_cache(cache)
    n_stored, nbytes = [layer.n_stored for layer in report.layers], sum(layer.nbytes for layer in report.layers)
    clustering = sum(layer.seconds for layer in report.layers)
    n_most = keep * len(case.tokens) * len(n_stored)
    if not method.stores_all and sum(n_stored) > n_most:
        raise RuntimeError(f"a cache must store at most {n_most:,.0f} entries in all layers, got {sum(n_stored):,}")
    measured: dict[str, Any] = {"n_stored": n_stored, "nbytes": nbytes}
    if case.needles:
        scores = score_needles(model, cache, case.needles, nbytes=nbytes, is_stepwise=is_stepwise)
        measured["needles"] = [
            {"kind": needle.kind, "depth": needle.depth, "is_right": score.is_right, "nll": rounded(score.nll)}
            for needle, score in zip(case.needles, scores, strict=True)
        ]
    if case.following:
        measured["following_nll"] = rounded(following_nll(model, cache, case.following, is_stepwise=is_stepwise))
    if key["has_attention_error"] and case.following:
        errors = attention_errors(model, context.full, cache, case.following, is_stepwise=is_stepwise)
        measured["attention_errors"] = rounded(errors)
    if case.prompts:
        measured["prompts"] = []
        for prompt in case.prompts:
            tokens = generate(
                model, cache, prompt.question, n_new=prompt.n_new, stop=stops(model, tokenizer), is_stepwise=is_stepwise
            )
            text = tokenizer.decode(tokens, skip_special_tokens=True)
            score = METRICS[prompt.metric](text, prompt.answers, prompt.classes)
            measured["prompts"].append(
                {"text": text, "answers": prompt.answers, "metric": prompt.metric, "score": score}
            )
    seconds = {"clustering": clustering, "asking": time.perf_counter() - begun}
    return measured | {"seconds": {part: round(value, 4) for part, value in seconds.items()}}


def stops(model: Any, tokenizer: Any) -> frozenset[int]:
    """Tokens that end a text."""
    end = getattr(model.generation_config, "eos_token_id", None)
    tokens = end if isinstance(end, list) else [end]
    return frozenset(token for token in (*tokens, tokenizer.eos_token_id) if token is not None)


def rounded(numbers: list[float]) -> list[float]:
    return [round(number, 6) for number in numbers]
