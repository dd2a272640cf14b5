"""Every method on every case; a pair that is already in the store is not run again."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from kvcluster.fast.huggingface.fingerprints import weights_digest

from ..layers import full_layers
from ..runs import Runs
from .cases import Case
from .measuring import measure, measure_question_first
from .methods import METHODS, Method
from .reading import Context

__all__ = ["Options", "check_methods", "run_all"]


@dataclass(frozen=True)
class Options:
    """The setting, and what is measured besides needles and prompts.

    Attributes
    ----------
    is_stepwise : tokens come one by one, so that what follows the context is clustered too, as in decoding.
    has_attention_error : compare the outputs of attention with those of the full cache, layer by layer.
    is_question_first : caches are compressed after context and question rather than after the context, anew for each
        question; see `reading`. Needles and prompts only: the text that follows a context has no question, so what is
        measured on it (perplexity and the error of attention) belongs to the other setting.

    Raises
    ------
    ValueError : `has_attention_error` with `is_question_first`.
    """

    is_stepwise: bool = False
    has_attention_error: bool = False
    is_question_first: bool = False

    def __post_init__(self) -> None:
        if self.has_attention_error and self.is_question_first:
            raise ValueError("has_attention_error must be False with is_question_first, got True")


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
    methods: Mapping[str, Method] | None = None,
    on_run: Callable[[], object] = lambda: None,
) -> list[dict[str, Any]]:
    """Results of every pair of method and `keep` on every case, case by case; new ones are added to `runs`.

    `methods` are those of `METHODS` by default, or what `with_profile` makes of them.

    Raises
    ------
    ValueError : a method cannot keep so little of a case; all layers of the model have a sliding window; a case has no
        question, and questions come first. Nothing has run then.
    RuntimeError : a method stored more entries than `keep` allows.
    """
    methods = METHODS if methods is None else methods
    full_layers(model)  # a model without any is refused
    for n_tokens in sorted({n for case in cases for n in lengths(case, options)}):
        for name, keep in pairs:
            methods[name].make(model, keep, n_tokens)
    weights = weights_digest(model)
    of_methods = {name: methods[name].profile for name, _ in pairs}
    profiles = {name: profile_of(model).digest for name, profile_of in of_methods.items() if profile_of is not None}
    results = []
    for case in cases:
        context = Context(model, case.tokens)
        for name, keep in pairs:
            method = methods[name]
            key = {
                "method": name,
                "keep": keep,
                "case": case.fingerprint,
                "model": weights,
                "is_stepwise": options.is_stepwise or method.is_stepwise,
                "has_attention_error": options.has_attention_error,
            }
            if options.is_question_first:  # absent otherwise, so that older runs are found
                key["is_question_first"] = True
            if name in profiles:
                key["profile"] = profiles[name]
            result = runs.found(key)
            if result is None:
                result = {"key": key, "task": case.task, "name": case.name, "n_tokens": len(case.tokens)}
                measure_setting = measure_question_first if options.is_question_first else measure
                result |= measure_setting(model, tokenizer, context, case, key, method)
                result = runs.add(result)
            results.append(result)
            on_run()
    return results


def lengths(case: Case, options: Options) -> list[int]:
    """How many tokens there are each time a cache of this case is compressed."""
    if not options.is_question_first:
        return [len(case.tokens)]
    if not case.asked:
        raise ValueError(f"case must have a question where questions come first, got none in {case.name}")
    return [len(case.tokens) + len(asked.question) for asked in case.asked]
