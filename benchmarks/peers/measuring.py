"""What caches of one case store and answer, in the format of `kvcluster.evaluation.quality`."""

import time
from typing import Any

import torch

from benchmarks.bits.layouts import of_channels
from benchmarks.peers.compressing import Prompt, side_by_side
from kvcluster.evaluation.quality import Case
from kvcluster.evaluation.quality.cases import Needle
from kvcluster.evaluation.quality.scoring import NeedleScore, following_nll, score_answers, score_needles

__all__ = ["measure", "measure_question_first"]


def measure(
    model: Any,
    cache: Any,
    case: Case,
    key: dict[str, Any],
    *,
    seconds: float,
    bits: int | None = None,
    n_kept: list[float] | None = None,
) -> dict[str, Any]:
    """Question later: of one cache of the context; `seconds` it took to compress. With `bits` it is quantized first.

    `n_kept`: entries of each layer, on average over its KV heads, of a cache that holds more and hides it.
    """
    n_stored, nbytes = stored(cache, key, len(case.tokens)) if n_kept is None else kept(cache, key, n_kept)
    if bits is not None:
        quantize(cache, bits)
    begun = time.perf_counter()
    scores = score_needles(model, cache, case.needles, nbytes=nbytes)
    nll = following_nll(model, cache, case.following)
    n_numbers = nbytes // full_layers(cache)[0].keys.itemsize
    of_number = 16 if bits is None else bits + 1  # with scale and least number of each group
    return result_of(case, key, n_stored, nbytes, scores) | {
        "nbytes_bfloat16": n_numbers * of_number // 8,
        "following_nll": rounded(nll),
        "seconds": {"clustering": round(seconds, 3), "asking": round(time.perf_counter() - begun, 2)},
    }


def measure_question_first(
    model: Any, caches: list[Any], prompts: list[Prompt], case: Case, key: dict[str, Any], *, seconds: float
) -> dict[str, Any]:
    """Question first: of the cache of each needle's prompt, all used up; `seconds` each took to compress, on average.

    Needles whose prompts have the same length are asked side by side. As for our own methods the first token of an
    answer comes from the exact prefill, and entries and bytes are those of the longest prompt.
    """
    held = [stored(cache, key, prompt.n_tokens) for cache, prompt in zip(caches, prompts, strict=True)]
    longest = max(range(len(prompts)), key=lambda index: prompts[index].n_tokens)
    scores: list[NeedleScore | None] = [None] * len(prompts)
    begun = time.perf_counter()
    for n_tokens in {prompt.n_tokens for prompt in prompts}:
        rows = [index for index, prompt in enumerate(prompts) if prompt.n_tokens == n_tokens]
        logits = torch.stack([prompts[index].logits for index in rows])
        answers = [case.needles[index].answer for index in rows]
        found = score_answers(model, side_by_side([caches[index] for index in rows]), logits, answers)
        for index, score in zip(rows, found, strict=True):
            scores[index] = score
    asking = time.perf_counter() - begun
    return result_of(case, key, *held[longest], scores) | {
        "n_prompt": prompts[longest].n_tokens,
        "seconds": {"clustering": round(seconds, 3), "asking": round(asking, 2)},
    }


def quantize(cache: Any, bits: int) -> None:
    """Put entries in `bits` and read them back, as KIVI would: groups of 32, keys by channel, values by entry."""
    for layer in full_layers(cache):
        layer.keys, layer.values = of_channels(layer.keys, layer.values, bits=bits, size=32)


def full_layers(cache: Any) -> list[Any]:
    """Those that attend to everything: of windows no press decides anything."""
    return [layer for layer in cache.layers if not layer.is_sliding]


def stored(cache: Any, key: dict[str, Any], n_tokens: int) -> tuple[list[int], int]:
    """Entries of each layer without a window and bytes of these, no more than the press may leave of `n_tokens`."""
    n_stored = [layer.keys.shape[-2] for layer in full_layers(cache)]
    if max(n_stored) > key["keep"] * n_tokens:
        raise RuntimeError(f"{key['method']} must store {key['keep']:g} of {n_tokens} entries, got {n_stored}")
    return n_stored, sum(x.nbytes for layer in full_layers(cache) for x in (layer.keys, layer.values))


def kept(cache: Any, key: dict[str, Any], n_kept: list[float]) -> tuple[list[float], int]:
    """As `stored`, of entries that are seen; a layer may have more than its part if the others have less."""
    n_seen = cache.get_seq_length()
    if sum(n_kept) > key["keep"] * n_seen * len(n_kept) + 1:
        raise RuntimeError(f"{key['method']} must keep {key['keep']:g} of {n_seen} entries, got {n_kept}")
    of_entry = [x.nbytes // x.shape[-2] for layer in cache.layers for x in (layer.keys, layer.values)]
    return n_kept, round(sum(n_kept) * sum(of_entry) / len(n_kept))


def result_of(case: Case, key: dict[str, Any], n_stored: list[Any], nbytes: int, scores: list[Any]) -> dict[str, Any]:
    return {
        "key": key,
        "task": case.task,
        "n_tokens": len(case.tokens),
        "n_stored": n_stored,
        "nbytes": nbytes,
        "needles": [of_needle(*pair) for pair in zip(case.needles, scores, strict=True)],
    }


def of_needle(needle: Needle, score: NeedleScore) -> dict[str, Any]:
    depth, nll = round(needle.depth, 4), rounded(score.nll)
    return {"kind": needle.kind, "depth": depth, "is_right": score.is_right, "nll": nll}


def rounded(numbers: list[float]) -> list[float]:
    return [round(number, 4) for number in numbers]
