"""Calls drawn at random, right ones and wrong ones, put to the reference and to the fast path."""

import dataclasses
import functools
import random
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
from fuzzed_layouts import laid_out, numpy_laid_out
from fuzzed_mistakes import spoil

from kvcluster import fast, reference
from kvcluster.conformance.case import Case
from kvcluster.conformance.comparing import compare_bits, compare_output, oracle_arguments
from kvcluster.conformance.inputs import KINDS, make_array, some_counts
from kvcluster.conformance.operation import Operation, call_function
from kvcluster.conformance.operations import OPERATIONS
from kvcluster.conformance.port import Outcome, Port

__all__ = ["CALLS", "Draw", "answer", "case_of", "difference", "in_fast", "in_reference"]

Call = tuple[dict[str, Any], dict[str, Any]]  # arrays and parameters
DIMS = (1, 2, 3, 5, 8, 16, 16, 16, 17, 32, 32, 48, 64, 80, 130)
LEADS = ((), (1,), (2,), (3,), (2, 2), (1, 2), (2, 1, 2), (0,), (2, 0))


class Draw(random.Random):
    """One call's random numbers; all its arrays have the dtype, mostly, and the kind that it begins with."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.seed_of_array = 100 * seed
        self.dtype, self.kind = self.choice(("f16", "bf16", "f32")), self.choice(KINDS)
        self.lead, self.dim = self.choice(LEADS), self.choice(DIMS)
        self.dim_value = self.dim if self.random() < 0.8 else self.choice(DIMS)

    def array(self, tokens: int, dim: int | None = None, lead: tuple[int, ...] | None = None) -> np.ndarray:
        self.seed_of_array += 3
        dtype = self.dtype if self.random() < 0.97 else self.choice(("f16", "bf16", "f32"))
        kind = self.kind if self.random() < 0.9 else self.choice(KINDS)
        shape = *(self.lead if lead is None else lead), tokens, self.dim if dim is None else dim
        array = make_array(kind, shape, dtype, self.seed_of_array)
        if len(shape) > 2 and shape[0] and self.random() < 0.1:
            array[:] = array[:1]  # as of one row for a whole batch
        return array

    def tokens(self, least: int = 0, most: int = 70) -> int:
        return self.choice((least, min(least + 1, most), self.randint(least, most), self.randint(least, most)))

    def ratio(self) -> Any:
        return self.choice((1, 1.0, 0.5, 0.25, 0.2, self.uniform(0.01, 1), np.float32(0.3), Fraction(1, 3)))

    def maybe(self, **named: Callable[[], Any]) -> dict[str, Any]:
        """Some of the parameters."""
        return {name: value() for name, value in named.items() if self.random() < 0.6}

    def scale(self) -> dict[str, Any]:
        return self.maybe(scale=lambda: self.choice((None, 0.3, -1, 0, np.float64(2.0), 1e-3)))

    def pieces(self, tokens: int) -> tuple[int, ...]:
        """Tokens of each append."""
        pieces = []
        while tokens > 0 and len(pieces) < 12:
            pieces.append(self.choice((0, 1, 1, self.randint(1, tokens), tokens)))
            tokens -= pieces[-1]
        return tuple(n for n in (*pieces, tokens) if n >= 0)


def of_partition(draw: Draw) -> Call:
    return {}, {"size": draw.choice((0, 1, 2, 7, np.int64(8), np.uint8(5)))}


def of_similarity(draw: Draw) -> Call:
    return {"a": draw.array(draw.tokens()), "b": draw.array(draw.tokens())}, {}


def of_chunks(draw: Draw) -> Call:
    ratio = {"keep_ratio": draw.ratio()}
    return {"keys": draw.array(draw.tokens())}, ratio | draw.maybe(chunk_size=lambda: draw.tokens(1, 40))


def of_distinctive(draw: Draw) -> Call:
    arrays, parameters = of_chunks(draw)
    arrays["values"] = draw.array(arrays["keys"].shape[-2], draw.dim_value)
    return arrays, parameters | draw.maybe(n_shared=lambda: draw.tokens(1, 9))


def of_attended(draw: Draw) -> Call:
    arrays, parameters = of_distinctive(draw)
    n_chunks = arrays["keys"].shape[-2] // parameters.get("chunk_size", 256)
    arrays["queries"] = draw.array(draw.tokens(1, 4), lead=(*draw.lead, n_chunks))
    return arrays, parameters | draw.maybe(share=draw.random)


def of_merge(draw: Draw) -> Call:
    array, entries = draw.array(draw.tokens(1)), draw.tokens(1, 9)
    entries = min(entries, array.shape[-2])
    labels = (np.arange(array.shape[-2]) * 7 + draw.randint(0, 9)) % entries
    counts = np.bincount(labels, minlength=entries)
    return {"array": array} | {n: np.tile(x, (*draw.lead, 1)) for n, x in (("labels", labels), ("counts", counts))}, {}


def of_attention(draw: Draw) -> Call:
    tokens = draw.choice((draw.tokens(1), draw.tokens(1), draw.tokens(1), 300))
    if draw.random() < 0.02:
        draw.lead, tokens = (), 2100  # in C++ more than one program
    arrays = {"query": draw.array(draw.tokens(1, 6)), "keys": draw.array(tokens)}
    return arrays | {"values": draw.array(tokens, draw.dim_value)}, draw.scale()


def of_counts(draw: Draw) -> Call:
    arrays, parameters = of_attention(draw)
    counts = some_counts(arrays["keys"].shape[:-1], draw.seed_of_array + 1)
    counts[..., 1:] *= draw.choice((1, 1, 0, 5000))
    dtype = draw.choice((np.int64, np.int32, np.int64, np.int32, np.int16)) if counts.max(initial=0) < 30000 else int
    return arrays | {"counts": counts.astype(dtype)}, parameters


def of_quantize(draw: Draw) -> Call:
    return {"array": draw.array(draw.tokens(0, 20))}, {"bits": draw.choice((2, 3, 4, 8))}


def of_kmeans(draw: Draw) -> Call:
    keys = draw.array(draw.tokens(1))
    n = draw.tokens(1, min(12, keys.shape[-2]))
    arrays = {"keys": keys}
    if draw.random() < 0.4:
        places = np.arange(n) * 5 % keys.shape[-2]
        of_tokens = np.broadcast_to(places, (*draw.lead, n)).astype(draw.choice((np.int64, np.int32)))
        arrays["init"] = draw.choice((of_tokens, draw.array(n)))
    options = draw.maybe(max_iter=lambda: draw.tokens(1, 5), is_centred=lambda: draw.random() < 0.5)
    return arrays, {"n_clusters": n} | options


def of_selection(draw: Draw) -> Call:
    n = draw.tokens(1, 30)
    centroids = draw.array(n)
    arrays = {"query": draw.array(draw.tokens(1, 4)), "centroids": centroids}
    arrays["counts"] = some_counts(centroids.shape[:-1], draw.seed_of_array + 1) * draw.choice((1, 1, 0))
    if draw.random() < 0.4:
        arrays["deviations"] = np.abs(draw.array(n))
    return arrays, {"budget": draw.tokens(0, 200)} | draw.maybe(spread=draw.random)


def of_recall(draw: Draw) -> Call:
    arrays, parameters = of_attention(draw)
    clusters = reference.kmeans(arrays["keys"], n_clusters=draw.tokens(1, min(9, arrays["keys"].shape[-2])), max_iter=2)
    arrays |= {"labels": clusters.labels, "counts": clusters.counts, "centroids": clusters.centroids}
    parameters |= {"budget": draw.tokens(1, 60)} | draw.maybe(centroids_for_rest=lambda: draw.random() < 0.5)
    return arrays, parameters | draw.maybe(spread=draw.random)


def of_cache(draw: Draw, *, most: int = 150) -> Call:
    tokens = draw.tokens(1, most)
    arrays = {"query": draw.array(draw.tokens(1, 4)), "keys": draw.array(tokens)}
    with np.errstate(over="ignore"):
        arrays["values"] = draw.array(tokens, draw.dim_value).astype(arrays["keys"].dtype)
    return arrays, {"pieces": draw.pieces(tokens)} | draw.scale()


def rules(draw: Draw) -> dict[str, Any]:
    sizes = {"chunk_size": draw.tokens(1, 33), "n_sink": draw.tokens(0, 6), "n_recent": draw.tokens(0, 40)}
    return sizes | draw.maybe(recent_share=lambda: draw.uniform(0, 0.5))


def with_bits(draw: Draw) -> dict[str, Any]:
    named = {"bits": draw.choice((16, 16, 16, 2, 4, 8, (3, 4), (8, 2)))}
    if named["bits"] != 16 and draw.random() < 0.3:
        named |= {"n_exact": draw.tokens(0, 30), "n_recent": draw.tokens(40, 70)}
    return named


def of_clustered(draw: Draw) -> Call:
    arrays, parameters = of_cache(draw)
    parameters |= rules(draw) | {"keep_ratio": draw.ratio()}
    if draw.random() < 0.25:
        parameters.pop("recent_share", None)
        room = sum(parameters[name] for name in ("chunk_size", "n_sink", "n_recent")) + parameters["chunk_size"]
        return arrays, parameters | {"budget": room + draw.tokens(0, 30)}
    if draw.random() < 0.5:
        parameters |= with_bits(draw)
    if draw.random() < 0.3:
        parameters["method"] = reference.Distinctive(n_shared=draw.tokens(1, 5))
    if draw.lead and draw.lead[-1] > 1 and draw.random() < 0.4:
        parameters["whole_heads"] = draw.choice(((), (1,), [0], (0, 1)))
    return arrays, parameters


def of_ragged(draw: Draw) -> Call:
    draw.lead = draw.choice(((1,), (2,), (3,), (2, 2), (1, 3)))
    arrays, parameters = of_cache(draw)
    ratios = tuple(draw.ratio() for _ in range(draw.lead[-1]))
    return arrays, parameters | rules(draw) | {"keep_ratios": ratios} | with_bits(draw)


def of_chelsea(draw: Draw) -> Call:
    arrays, parameters = of_cache(draw)
    parameters |= {"ratio": draw.ratio(), "max_new_tokens": draw.tokens(0, 30), "chunk_size": draw.tokens(2, 33)}
    parameters |= {"n_sink": draw.tokens(0, 6), "n_recent": draw.tokens(0, 30)}
    return arrays, parameters | draw.maybe(interval=lambda: draw.tokens(0, 20), n_prompt=lambda: draw.tokens(0, 99))


def of_recall_cache(draw: Draw) -> Call:
    arrays, parameters = of_cache(draw)
    sizes = {"n_sink": draw.tokens(0, 6), "n_recent": draw.tokens(0, 6), "tokens_per_cluster": draw.tokens(1, 9)}
    parameters |= sizes | {"budget": draw.tokens(90, 140), "segment_size": draw.tokens(1, 40)}
    booleans = ("is_centred", "centroids_for_rest", "is_per_query_head", "is_exact_counted")
    parameters |= draw.maybe(**dict.fromkeys(booleans, lambda: draw.random() < 0.5))
    parameters |= draw.maybe(
        max_iter=lambda: draw.tokens(1, 4), spread=draw.random, bits=lambda: draw.choice((16, 4, 8))
    )
    return arrays, parameters | draw.maybe(
        prompt_segment_size=lambda: draw.choice((None, 0, 30, 64)), init_seed=lambda: draw.choice((None, 0, 7))
    )


CALLS: dict[str, Callable[[Draw], Call]] = {
    "alternating_partition": of_partition,
    "similarity": of_similarity,
    "chunked_soft_matching": of_chunks,
    "distinctive_matching": of_distinctive,
    "attended_matching": of_attended,
    "merge": of_merge,
    "attention": of_attention,
    "clustered_attention": of_counts,
    "quantize": of_quantize,
    "kmeans": of_kmeans,
    "select_clusters": of_selection,
    "recall_attention": of_recall,
    "ClusteredCache": of_clustered,
    "RaggedCache": of_ragged,
    "ChelseaCache": of_chelsea,
    "RecallCache": of_recall_cache,
}


def case_of(seed: int, *, share_wrong: float = 0.4) -> Case:
    """The call of this number, all operations in turn; with something wrong, or two things, in a share of them."""
    draw = Draw(seed)
    operation = list(CALLS)[seed % len(CALLS)]
    arrays, parameters = CALLS[operation](draw)
    wrong = []
    while draw.random() < share_wrong and len(wrong) < 2:
        wrong += spoil(draw, operation, arrays, parameters)
    return Case(operation, ", ".join([f"call {seed}", *wrong]), arrays, parameters, is_refused=bool(wrong))


def quantized_and_back(operation: Operation, port: Port, case: Case) -> dict[str, np.ndarray]:
    kept: list[Any] = []

    def quantize(*array: Any, **bits: Any) -> Any:
        kept.append(port.namespace.quantize(*array, **bits))
        return kept[0]

    spelled = dataclasses.replace(operation, spelling=lambda port, case: (quantize, case.parameters))
    results = call_function(spelled, port, case)
    numbers = port.to_numpy(port.namespace.dequantize(kept[0], case.arrays["array"].shape[-1]))
    scales = results["scales"].astype(np.float32)
    return results | {"codes": results["codes"].astype(np.int64), "scales": scales, "numbers": numbers}


def answer(port: Port, case: Case) -> Outcome:
    """What a package says to a call: arrays by name, or its refusal."""
    operation = OPERATIONS[case.operation]
    call = quantized_and_back if case.operation == "quantize" else operation.call
    try:
        return Outcome(call(operation, port, case))
    except Exception as error:
        return Outcome({}, error)


def in_fast(case: Case) -> Outcome:
    port = Port(fast)
    port.from_numpy = functools.partial(laid_out, random.Random(case.name))
    return answer(port, case)


def in_reference(case: Case) -> Outcome:
    port = Port(reference)
    port.from_numpy = functools.partial(numpy_laid_out, random.Random(case.name))
    with np.errstate(all="ignore"):
        return answer(port, case)


def refusal(error: BaseException | None) -> tuple[str, str]:
    """What is said, with the same word for an array."""
    words = str(error)
    for own in ("a NumPy array", "a torch tensor"):
        words = words.replace(own, "an array")
    return type(error).__name__, words


def has_bound(case: Case, oracle: np.ndarray) -> bool:
    """Whether attention in float32 has one: not where a logit overflows, nor a baseline."""
    query, keys, _, _, scale = oracle_arguments(case)
    sizes = np.abs(query.astype(np.float64)) @ np.abs(keys.astype(np.float64)).swapaxes(-1, -2)
    largest = sizes.max() * max(1, abs(1 if scale is None else scale))
    return bool(largest < np.finfo(np.float32).max) and compare_output(case, oracle) is None


def difference(case: Case, ours: Outcome, right: Outcome) -> str | None:
    """In what an outcome differs from that of the reference; None if in nothing."""
    if right.error is not None or ours.error is not None:
        said = refusal(ours.error), refusal(right.error)
        is_refused = isinstance(right.error, ValueError | TypeError) and said[0] == said[1]
        return None if is_refused else f"{said[0]} in place of {said[1]}"
    if not right.arrays.keys() <= ours.arrays.keys():
        return f"{sorted(ours.arrays)} in place of {sorted(right.arrays)}"
    for name, array in right.arrays.items():
        if name != "output":
            found = compare_bits(name, ours.arrays[name], array)
        elif not array.size or not has_bound(case, array):
            continue
        else:
            found = compare_output(case, ours.arrays[name])
        if found is not None:
            return f"{found.text}: {found.got} in place of {found.expected}"
    return None
