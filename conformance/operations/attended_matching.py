"""`attended_matching`."""

import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from kvcluster import reference
from kvcluster.reference.chunks import entries_of_chunk
from kvcluster.reference.distinctive_matching import match_ordinary, numbers_of_entries
from kvcluster.reference.merging import Clustering
from kvcluster.reference.similarity import halving_sum

from ..case import Case
from ..drawing import Drawing
from ..inputs import DTYPES, KINDS, make_array, refused_arrays
from ..mistake import Mistake, Patch
from ..operation import Operation
from .chunked_soft_matching import joined
from .distinctive_matching import keys_and_values, likeness_to_rounded_mean

__all__ = ["OPERATION"]

MODULE = sys.modules["kvcluster.reference.attended_matching"]  # the name alone is the function
right_matching = reference.attended_matching
right_match, right_margins = MODULE.match_attended, MODULE.attention_margins
PLAN = {"keep_ratio": 0.4, "chunk_size": 20, "n_shared": 3}


def cases(base: int) -> Iterator[Case]:
    settings: Any = ((0.4, 20, 3, 0.5), (0.25, 16, 4, 0.7), (0.5, 9, 40, 1.0), (0.1, 8, 1, 0.5), (1.0, 8, 4, 0.5))
    settings += ((0.7, 13, 2, 0.3), (0.6, 33, 2, 0.0))
    for index, (dtype, kind) in enumerate((d, k) for d in DTYPES for k in KINDS):
        keep_ratio, chunk_size, n_shared, share = settings[index % len(settings)]
        shape = (2, 1 + index % 3, 2 * chunk_size + index % 4)
        dims = ((16, 5), (64, 80), (7, 7))[index % 3]
        arrays = with_queries(kind, shape, dims, dtype, base + 400 + index, chunk_size, 1 + index % 5)
        name = f"{kind}-C{chunk_size}-keep{keep_ratio}-shared{n_shared}-share{share}-{dtype}"
        rules = {"keep_ratio": keep_ratio, "chunk_size": chunk_size, "n_shared": n_shared, "share": share}
        yield case(name, arrays, rules)
    for dtype in DTYPES:
        arrays = with_queries("smooth", (2, 2, 180), (16, 16), dtype, base + 440, 20, 6)
        yield case(f"chunks-{dtype}", arrays, PLAN)
    yield case("defaults", with_queries("normal", (2, 600), (8, 8), "f32", base + 441, 256, 21), {"keep_ratio": 0.25})
    yield case("no-heads", with_queries("signs", (47,), (8, 8), "f32", base + 442, 20, 3), PLAN)
    for tokens in (0, 19):
        yield case(f"normal-T{tokens}", with_queries("normal", (2, tokens), (8, 8), "f32", base + 443, 20, 2), PLAN)
    same, queries = np.ones((2, 40, 4), np.float32), np.ones((2, 2, 3, 4), np.float32)  # all tie
    yield case("equal-tokens", {"keys": same, "values": same, "queries": queries}, PLAN)
    large = with_queries("normal", (2, 40), (8, 8), "f32", base + 444, 20, 3)  # exact in float64 alone
    yield case("large", {**large, "keys": large["keys"] + np.float32(2**12)}, PLAN)


def with_queries(
    kind: str, shape: tuple[int, ...], dims: tuple[int, int], dtype: str, seed: int, chunk_size: int, n_queries: int
) -> dict[str, np.ndarray]:
    """Keys and values as in `distinctive_matching`, and queries of each whole chunk."""
    of_chunks = (*shape[:-1], shape[-1] // chunk_size, n_queries, dims[0])
    queries = make_array("normal" if kind == "zeros" else kind, of_chunks, dtype, 2 * seed + 1000)
    return {**keys_and_values(kind, shape, dims, dtype, seed), "queries": queries}


def case(name: str, arrays: dict[str, np.ndarray], parameters: dict[str, Any]) -> Case:
    return Case("attended_matching", name, arrays, parameters)


def refused() -> Iterator[Case]:
    keys, bad = refused_arrays()
    rule: dict[str, Any] = {"keep_ratio": 0.5, "chunk_size": 4}
    queries = np.ones((*keys.shape[:-2], keys.shape[-2] // 4, 3, keys.shape[-1]), keys.dtype)
    wrong = {
        "queries-dim": queries[..., :-1],
        "queries-chunks": queries[..., :-1, :, :],
        "no-queries": queries[..., :0, :],
    }
    wrong |= {"queries-nan": queries * np.float32(np.nan), "queries-dtype": queries.astype(np.float16)}
    calls = [(name, array, queries, rule) for name, array in bad.items()]
    calls += [(name, keys, array, rule) for name, array in wrong.items()]
    given = (("keep_ratio", 1.5), ("chunk_size", 0), ("n_shared", 0), ("share", 1.5), ("share", -0.5))
    calls += [(f"{name}{value}", keys, queries, {**rule, name: value}) for name, value in given]
    for name, values, of_chunks, parameters in calls:
        arrays = {"keys": keys, "values": values, "queries": of_chunks}
        yield Case("attended_matching", f"refused-{name}", arrays, parameters, is_refused=True)


def small(draw: Drawing) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    draw.heads, tokens, chunk_size = draw.integer(1, 2), draw.integer(1, 9), draw.integer(1, 8)
    arrays = {"keys": draw.rows(tokens), "values": draw.rows(tokens)}
    n_queries, chunks = draw.integer(1, 3), tokens // chunk_size
    rows = draw.rows(max(1, chunks * n_queries))[..., : chunks * n_queries, :]
    arrays["queries"] = rows.reshape(*rows.shape[:-2], chunks, n_queries, rows.shape[-1])
    rules = {"keep_ratio": draw.ratio(), "chunk_size": chunk_size, "n_shared": draw.integer(1, 3)}
    return arrays, {**rules, "share": draw.integer(0, 4) / 4}


def decisions(case: Case) -> Iterator[str]:
    """A line for each token of each chunk of one layer: its margins, and where it goes in each head."""
    keys, values = (x[(0,) * max(0, x.ndim - 3)] for x in (case.arrays["keys"], case.arrays["values"]))
    queries = case.arrays["queries"][(0,) * max(0, case.arrays["keys"].ndim - 3)]
    chunk_size, share = case.parameters.get("chunk_size", 256), case.parameters.get("share", 0.5)
    target = entries_of_chunk(case.parameters["keep_ratio"], chunk_size)
    n_exact, n_shared = numbers_of_entries(target, case.parameters.get("n_shared", 4))
    n_attended = math.floor(share * n_exact)
    yield f"of {target} entries {n_attended} are attended, {n_exact - n_attended} distinctive, {n_shared} shared"
    for chunk in range(keys.shape[-2] // chunk_size if target < chunk_size else 0):
        span = slice(chunk * chunk_size, (chunk + 1) * chunk_size)
        chunk_keys, chunk_values = keys[..., span, :], values[..., span, :]
        margins = right_margins(chunk_keys, queries[..., chunk, :, :])
        labels = right_match(chunk_keys, chunk_values, margins, target, share, n_shared)
        for token in range(chunk_size):
            of_heads = ", ".join(f"{margin:.17g}" for margin in np.ravel(margins[..., token]))
            entries = ", ".join(map(str, np.ravel(labels[..., token]).tolist()))
            yield f"chunk {chunk}, token {token} has margins {of_heads}: entries {entries}"


def in_module(name: str, wrong: object) -> tuple[Patch, ...]:
    return (("attended_matching", name, wrong),)


def margins_by(wrong: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> tuple[Patch, ...]:
    return in_module("attention_margins", wrong)


def dots(keys: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """(..., queries, tokens)"""
    products: np.ndarray = queries.astype(np.float64)[..., :, None, :] * keys.astype(np.float64)[..., None, :, :]
    return halving_sum(products)


def mean_margins(keys: np.ndarray, queries: np.ndarray) -> np.ndarray:
    of_each = [right_margins(keys, queries[..., i : i + 1, :]) for i in range(queries.shape[-2])]
    mean: np.ndarray = np.mean(of_each, axis=0)
    return mean


def weights(keys: np.ndarray, queries: np.ndarray) -> np.ndarray:
    logits = dots(keys, queries) / math.sqrt(keys.shape[-1])
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    mean: np.ndarray = (exponentials / exponentials.sum(axis=-1, keepdims=True)).mean(axis=-2)
    return mean


def of_length_1(array: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(array.astype(np.float64), axis=-1, keepdims=True)
    return np.divide(array, lengths, out=np.zeros(array.shape), where=lengths != 0)


def matched_by(
    *,
    rounded: Callable[[float], int] = math.floor,
    of_target: bool = False,
    last: bool = False,
    is_distinctive_first: bool = False,
) -> tuple[Patch, ...]:
    """`match_attended` with another number of attended tokens, ties to the last token, or the other choice first."""

    def match(
        keys: np.ndarray, values: np.ndarray, margins: np.ndarray, target: int, share: float, n: int
    ) -> np.ndarray:
        *heads, size, _ = keys.shape
        if target == size:
            return right_match(keys, values, margins, target, share, n)
        n_exact, n_shared = numbers_of_entries(target, n)
        n_attended = min(n_exact, rounded(share * (target if of_target else n_exact)))
        n_first = n_exact - n_attended if is_distinctive_first else n_attended
        distinctive = np.argsort(-MODULE.distinctiveness(keys, values), kind="stable")
        labels = np.empty((*heads, size), dtype=np.int64)
        for head in np.ndindex(*heads):
            attended = np.argsort(-margins[head], kind="stable")
            if last:
                attended = size - 1 - np.argsort(-margins[head][::-1], kind="stable")
            first, then = (distinctive, attended) if is_distinctive_first else (attended, distinctive)
            others = then[~np.isin(then, first[:n_first])]
            labels[head] = match_ordinary(keys[head], np.append(first[:n_first], others)[:n_exact], n_shared)
        return labels

    return in_module("match_attended", match)


def match_with_shared_margins(keys: np.ndarray, values: np.ndarray, margins: np.ndarray, *rules: Any) -> np.ndarray:
    together = margins if margins.ndim == 1 else np.broadcast_to(margins.max(axis=0), margins.shape)
    return right_match(keys, values, together, *rules)


def with_queries_of_the_first_chunk(
    keys: np.ndarray, values: np.ndarray, queries: np.ndarray, **rules: Any
) -> Clustering:
    return right_matching(keys, values, np.broadcast_to(queries[..., :1, :, :], queries.shape), **rules)


def with_partial_chunk(
    keys: np.ndarray, values: np.ndarray, queries: np.ndarray, *, chunk_size: int = 256, **rules: Any
) -> Clustering:
    n_whole = keys.shape[-2] // chunk_size * chunk_size
    if n_whole in (0, keys.shape[-2]):
        return right_matching(keys, values, queries, chunk_size=chunk_size, **rules)
    whole = right_matching(keys[..., :n_whole, :], values[..., :n_whole, :], queries, chunk_size=chunk_size, **rules)
    rest = keys[..., n_whole:, :], values[..., n_whole:, :], queries[..., -1:, :, :]
    return joined([whole, right_matching(*rest, chunk_size=keys.shape[-2] - n_whole, **rules)])


OPERATION = Operation(
    name="attended_matching",
    section=20,
    results=("labels", "counts"),
    cases=cases,
    refused=refused,
    small=small,
    decisions=decisions,
    mistakes=(
        Mistake(
            "the queries take no part: a part of the exact tokens is chosen by them",
            "20.3",
            margins_by(lambda keys, queries: np.zeros(keys.shape[:-1])),
        ),
        Mistake(
            "a token's score is its largest dot product: it is by how much that surpasses those of all other tokens",
            "20.2",
            margins_by(lambda keys, queries: dots(keys, queries).max(axis=-2)),
        ),
        Mistake(
            "a query's best token has a margin of 0: it is compared with the best of the others",
            "20.2",
            margins_by(lambda keys, queries: np.minimum(right_margins(keys, queries), 0.0)),
        ),
        Mistake("margins are averaged over the queries: the largest counts", "20.2", margins_by(mean_margins)),
        Mistake("scores are attention weights: they are differences of dot products", "20.2", margins_by(weights)),
        Mistake(
            "keys are divided by their lengths: dot products are of the keys as they are",
            "20.2",
            margins_by(lambda keys, queries: right_margins(of_length_1(keys), queries)),
        ),
        Mistake(
            "queries are divided by their lengths: dot products are of the queries as they are",
            "20.2",
            margins_by(lambda keys, queries: right_margins(keys, of_length_1(queries))),
        ),
        Mistake(
            "the tokens that are attended to least stay exact: those of the largest margins do",
            "20.3",
            margins_by(lambda keys, queries: -right_margins(keys, queries)),
        ),
        Mistake(
            "all heads keep the same attended tokens: each chooses by its own queries",
            "20.3",
            in_module("match_attended", match_with_shared_margins),
        ),
        Mistake(
            "the distinctive tokens are chosen first: they are chosen among those that are left",
            "20.3",
            matched_by(is_distinctive_first=True),
        ),
        Mistake("share is of all entries: it is of the exact ones", "20.3", matched_by(of_target=True)),
        Mistake("share is rounded up: it is rounded down", "20.3", matched_by(rounded=math.ceil)),
        Mistake("ties between margins go to the last token: the first stay exact", "20.3", matched_by(last=True)),
        Mistake(
            "all chunks are matched by the queries of the first: each has its own",
            "20.1",
            (("", "attended_matching", with_queries_of_the_first_chunk),),
        ),
        Mistake(
            "the mean of a chunk is rounded to the dtype of the tokens: it is float32",
            "16.2",
            (("distinctive_matching", "likeness_to_mean", likeness_to_rounded_mean),),
        ),
        Mistake(
            "distinctiveness is not averaged over neighbours: seven tokens count",
            "16.3",
            (("distinctive_matching", "WINDOW", 1),),
        ),
        Mistake(
            "the trailing partial chunk is matched: it must stay as it is",
            "16.1",
            (("", "attended_matching", with_partial_chunk),),
        ),
    ),
    scaffold='''
def attended_matching(keys, values, queries, *, keep_ratio, chunk_size=256, share=0.5, n_shared=4):
    """labels (..., tokens), counts (..., entries); queries (..., chunks, queries, dim)."""
    return my_package.match_attended(keys, values, queries, keep_ratio, chunk_size, share, n_shared)
''',
)
