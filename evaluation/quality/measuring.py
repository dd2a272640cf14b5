"""What one method's cache stores of a case and answers, in each of the two settings, as JSON."""

import time
from dataclasses import dataclass
from typing import Any

from kvcluster.fast import RecallCache
from kvcluster.fast.huggingface.report import report_cache

from .attention_error import attention_errors
from .cases import Case, Needle, Prompt
from .methods import Method
from .metrics import METRICS
from .reading import Context
from .scoring import NeedleScore, copy_rows, following_nll, generate, generate_on, score_answers, score_needles

__all__ = ["measure", "measure_question_first"]


def measure(
    model: Any, tokenizer: Any, context: Context, case: Case, key: dict[str, Any], method: Method
) -> dict[str, Any]:
    """Question later: one cache of the context, and copies of it for all that is asked."""
    keep, is_stepwise = key["keep"], key["is_stepwise"]
    cache = context.cache(method, keep)
    begun = time.perf_counter()
    held = stored(cache, method, keep, len(case.tokens))
    measured: dict[str, Any] = {"n_stored": held.n_stored, "nbytes": held.nbytes}
    measured |= {"nbytes_bfloat16": nbytes_in_bfloat16(cache)}
    if case.needles:
        scores = score_needles(model, cache, case.needles, nbytes=held.nbytes, is_stepwise=is_stepwise)
        measured["needles"] = [of_needle(*pair) for pair in zip(case.needles, scores, strict=True)]
    if case.following:
        measured["following_nll"] = rounded(following_nll(model, cache, case.following, is_stepwise=is_stepwise))
    if key["has_attention_error"] and case.following:
        errors = attention_errors(model, context.full, cache, case.following, is_stepwise=is_stepwise)
        measured["attention_errors"] = rounded(errors)
    if case.prompts:
        stop = stops(model, tokenizer)
        answers = [
            generate(model, cache, prompt.question, n_new=prompt.n_new, stop=stop, is_stepwise=is_stepwise)
            for prompt in case.prompts
        ]
        measured["prompts"] = [of_prompt(tokenizer, *pair) for pair in zip(case.prompts, answers, strict=True)]
    return measured | {"seconds": seconds(held.clustering, time.perf_counter() - begun)}


def measure_question_first(
    model: Any, tokenizer: Any, context: Context, case: Case, key: dict[str, Any], method: Method
) -> dict[str, Any]:
    """Question first: for each question the prompt is read exactly and a cache of its own compressed.

    Entries and bytes are those of the longest prompt, of `n_prompt` tokens; every prompt's are held to `keep`. Seconds
    of clustering are those of a prompt, mean over all.
    """
    keep = key["keep"]
    held: list[Stored] = []
    needles, prompts, stop = [], [], stops(model, tokenizer)
    assert context.full.get_seq_length() == len(case.tokens)  # read before the clock starts, whoever is first
    begun = time.perf_counter()
    for asked_for in case.asked:
        asked = context.ask(asked_for.question)
        cache = asked.prompt.cache(method, keep)
        if cache is asked.prompt.full:
            cache = copy_rows(cache)
        held.append(stored(cache, method, keep, len(asked.prompt.tokens)))
        if isinstance(asked_for, Needle):
            answers = [asked_for.answer]
            [score] = score_answers(model, cache, asked.logits[None], answers, is_stepwise=key["is_stepwise"])
            needles.append(of_needle(asked_for, score))
        else:
            answer = generate_on(model, cache, asked.logits, n_new=asked_for.n_new, stop=stop)
            prompts.append(of_prompt(tokenizer, asked_for, answer))
    clustering = sum(each.clustering for each in held)
    longest = max(held, key=lambda each: each.n_tokens)
    measured: dict[str, Any] = {"n_prompt": longest.n_tokens, "n_stored": longest.n_stored, "nbytes": longest.nbytes}
    measured |= {name: answers for name, answers in (("needles", needles), ("prompts", prompts)) if answers}
    return measured | {"seconds": seconds(clustering / len(held), time.perf_counter() - begun - clustering)}


@dataclass(frozen=True)
class Stored:
    """What a cache holds of `n_tokens` tokens.

    Attributes
    ----------
    n_stored : entries of each layer that attends to all tokens; of sliding windows no method decides anything.
    nbytes : of all layers.
    clustering : seconds.
    """

    n_tokens: int
    n_stored: list[float]
    nbytes: int
    clustering: float


def stored(cache: Any, method: Method, keep: float, n_tokens: int) -> Stored:
    """What `cache` holds, and that it is no more than `keep` allows."""
    layers = report_cache(cache).layers
    n_stored = [layer.n_stored for layer, held in zip(layers, cache.layers, strict=True) if not held.is_sliding]
    n_most = keep * n_tokens * len(n_stored)
    if not method.stores_all and sum(n_stored) > n_most:
        raise RuntimeError(f"a cache must store at most {n_most:,.0f} entries in all layers, got {sum(n_stored):,}")
    return Stored(n_tokens, n_stored, sum(layer.nbytes for layer in layers), sum(layer.seconds for layer in layers))


def nbytes_in_bfloat16(cache: Any) -> int:
    """Bytes of the layers that attend to all tokens if numbers that are not quantized had two bytes, counts included.

    So caches are compared whatever the dtype of the model that was at hand.
    """
    total = 0
    for layer in cache.layers:
        if layer.is_sliding:
            continue
        if not hasattr(layer, "cache"):
            total += 2 * (layer.keys.numel() + layer.values.numel())
        else:
            numbers = sum(n_numbers(each) for each in layer.cache.caches)
            total += layer.cache.nbytes - (layer.dtype.itemsize - 2) * numbers
    return total


def n_numbers(cache: Any) -> int:
    """Numbers of keys and values that a layer's cache holds in its dtype: all of a recall cache."""
    if isinstance(cache, RecallCache):
        return sum(array.numel() for array in cache.like or ())
    held: int = cache.n_numbers
    return held


def of_needle(needle: Needle, score: NeedleScore) -> dict[str, Any]:
    return {"kind": needle.kind, "depth": needle.depth, "is_right": score.is_right, "nll": rounded(score.nll)}


def of_prompt(tokenizer: Any, prompt: Prompt, tokens: list[int]) -> dict[str, Any]:
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    score = METRICS[prompt.metric](text, prompt.answers, prompt.classes)
    return {"text": text, "answers": prompt.answers, "metric": prompt.metric, "score": score}


def stops(model: Any, tokenizer: Any) -> frozenset[int]:
    """Tokens that end a text."""
    end = getattr(model.generation_config, "eos_token_id", None)
    tokens = end if isinstance(end, list) else [end]
    return frozenset(token for token in (*tokens, tokenizer.eos_token_id) if token is not None)


def rounded(numbers: list[float]) -> list[float]:
    return [round(number, 6) for number in numbers]


def seconds(clustering: float, asking: float) -> dict[str, float]:
    return {"clustering": round(clustering, 4), "asking": round(asking, 4)}
