"""`distinctive_matching`."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from kvcluster import reference
from kvcluster.reference.chunks import entries_of_chunk
from kvcluster.reference.merging import Clustering, merge
from kvcluster.reference.similarity import similarity

from ..case import Case
from ..changes import without
from ..drawing import Drawing
from ..inputs import DTYPES, KINDS, make_array, refused_arrays
from ..mistake import Mistake, Patch
from ..operation import Operation
from ..port import Port
from .chunked_soft_matching import TARGET, joined
from .similarity import SIMILARITY

__all__ = ["DISTINCTIVE", "IGNORED", "OPERATION", "Distinctive", "given_to"]

MODULE = sys.modules["kvcluster.reference.distinctive_matching"]  # the name alone is the function
right_matching, right_match = reference.distinctive_matching, MODULE.match_distinctive
right_distinctiveness = MODULE.distinctiveness


@dataclass(frozen=True)
class Distinctive:
    """The method of a cache in a case. A port gets its own class of this name, or this one if it has none."""

    n_shared: int


def given_to(port: Port, method: Any) -> Any:
    """The method as the port's own class of this name, or as it is."""
    return getattr(port.namespace, type(method).__name__, type(method))(**asdict(method))


def cases(base: int) -> Iterator[Case]:
    settings = ((0.4, 20, 3), (0.25, 16, 4), (0.5, 9, 40), (0.1, 8, 1), (1.0, 8, 4), (0.7, 13, 2))
    for index, (dtype, kind) in enumerate((d, k) for d in DTYPES for k in KINDS):
        keep_ratio, chunk_size, n_shared = settings[index % len(settings)]
        lead, tokens = (2, 1 + index % 3), 2 * chunk_size + index % 4
        arrays = keys_and_values(
            kind, (*lead, tokens), ((16, 5), (64, 80), (7, 7))[index % 3], dtype, base + 150 + index
        )
        name = f"{kind}-C{chunk_size}-keep{keep_ratio}-shared{n_shared}-{dtype}"
        yield case(name, arrays, {"keep_ratio": keep_ratio, "chunk_size": chunk_size, "n_shared": n_shared})
    plan = {"keep_ratio": 0.4, "chunk_size": 20, "n_shared": 3}
    for dtype in DTYPES:  # the ends of chunks, where fewer neighbours count, and the bits of means
        yield case(f"chunks-{dtype}", keys_and_values("smooth", (2, 2, 180), (16, 16), dtype, base + 180), plan)
    yield case("defaults", keys_and_values("normal", (2, 600), (8, 8), "f32", base + 181), {"keep_ratio": 0.25})
    yield case("no-heads", keys_and_values("signs", (47,), (8, 8), "f32", base + 182), plan)
    for tokens in (0, 19):
        yield case(f"normal-T{tokens}", keys_and_values("normal", (2, tokens), (8, 8), "f32", base + 183), plan)
    same = np.ones((2, 40, 4), np.float32)  # all tie
    yield case("equal-tokens", {"keys": same, "values": same}, plan)
    phrase = same.copy()
    phrase[:, 11:14] = -1
    for name, keys, values in (("phrase-of-keys", phrase, same), ("phrase-of-values", same, phrase)):
        yield case(name, {"keys": keys, "values": values}, plan)


def case(name: str, arrays: dict[str, np.ndarray], parameters: dict[str, Any]) -> Case:
    return Case("distinctive_matching", name, arrays, parameters)


def keys_and_values(
    kind: str, shape: tuple[int, ...], dims: tuple[int, int], dtype: str, seed: int
) -> dict[str, np.ndarray]:
    """Both of one kind; `dims` are dim and dim_value."""
    return {
        name: make_array(kind, (*shape, dim), dtype, 2 * seed + i)
        for i, (name, dim) in enumerate(zip(("keys", "values"), dims, strict=True))
    }


def refused() -> Iterator[Case]:
    keys, bad = refused_arrays()
    rule: dict[str, Any] = {"keep_ratio": 0.5, "chunk_size": 4}
    calls = [(name, array, rule) for name, array in bad.items()] + [("shapes", keys[:, :7], rule)]
    calls += [(name, keys, {**rule, name: wrong}) for name, wrong in (("keep_ratio", 1.5), ("chunk_size", 0))]
    calls += [("n_shared", keys, {**rule, "n_shared": 0})]
    for name, values, parameters in calls:
        arrays = {"keys": keys, "values": values}
        yield Case("distinctive_matching", f"refused-{name}", arrays, parameters, is_refused=True)


def small(draw: Drawing) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    draw.heads, tokens = draw.integer(1, 2), draw.integer(1, 9)  # heads share their scores
    arrays = {"keys": draw.rows(tokens), "values": draw.rows(tokens)}
    return arrays, {"keep_ratio": draw.ratio(), "chunk_size": draw.integer(1, 8), "n_shared": draw.integer(1, 3)}


def decisions(case: Case) -> Iterator[str]:
    """A line for each token of each chunk of one layer: its score, and where it goes in each head."""
    keys, values = (x[(0,) * max(0, x.ndim - 3)] for x in (case.arrays["keys"], case.arrays["values"]))
    chunk_size = case.parameters.get("chunk_size", 256)
    target = entries_of_chunk(case.parameters["keep_ratio"], chunk_size)
    n_shared = max(1, min(case.parameters.get("n_shared", 4), target // 2))
    yield f"a chunk of {chunk_size} tokens becomes {target} entries, the last {n_shared} of them shared"
    for chunk in range(keys.shape[-2] // chunk_size if target < chunk_size else 0):
        span = slice(chunk * chunk_size, (chunk + 1) * chunk_size)
        chunk_arrays = keys[..., span, :], values[..., span, :]
        scores, labels = right_distinctiveness(*chunk_arrays), right_match(*chunk_arrays, target, n_shared)
        for token, score in enumerate(scores):
            entries = np.ravel(labels[..., token]).tolist()  # of each head
            where = "it stays exact, entry" if entries[0] < target - n_shared else "ordinary, in entry"
            yield f"chunk {chunk}, token {token} scores {score:.17g}: {where} {', '.join(map(str, entries))}"


def matched_by(
    *,
    last_token: bool = False,
    last_destination: bool = False,
    first_destinations: bool = False,
    may_leave: bool = False,
    shared_first: bool = False,
    is_uncapped: bool = False,
) -> tuple[Patch, ...]:
    """`match_distinctive` with ties to the last token or destination, or with one of its other steps changed."""

    def match_distinctive(keys: np.ndarray, values: np.ndarray, target: int, n_shared: int) -> np.ndarray:
        *heads, size, _ = keys.shape
        if target == size:
            return right_match(keys, values, target, n_shared)
        n_shared = min(n_shared, target) if is_uncapped else max(1, min(n_shared, target // 2))
        n_exact = target - n_shared
        scores = MODULE.distinctiveness(keys, values)
        best_first = np.argsort(-scores, kind="stable")
        if last_token:
            best_first = size - 1 - np.argsort(-scores[::-1], kind="stable")
        exact, ordinary = np.sort(best_first[:n_exact]), np.sort(best_first[n_exact:])
        destinations = np.arange(n_shared) if first_destinations else np.arange(n_shared) * len(ordinary) // n_shared
        labels = np.empty((*heads, size), dtype=np.int64)
        labels[..., exact] = np.arange(n_exact) + (n_shared if shared_first else 0)
        for head in np.ndindex(*heads):
            similarities = similarity(keys[head][ordinary], keys[head][ordinary][destinations])
            match = similarities.argmax(axis=-1)
            if last_destination:
                match = n_shared - 1 - similarities[:, ::-1].argmax(axis=-1)
            if not may_leave:
                match[destinations] = np.arange(n_shared)
            labels[head][ordinary] = match + (0 if shared_first else n_exact)
        return labels

    return in_module("match_distinctive", match_distinctive)


def in_module(name: str, wrong: object) -> tuple[Patch, ...]:
    return (("distinctive_matching", name, wrong),)


def scored_by(wrong: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> tuple[Patch, ...]:
    return in_module("distinctiveness", wrong)


def match_each_head_alone(keys: np.ndarray, values: np.ndarray, target: int, n_shared: int) -> np.ndarray:
    if keys.ndim == 2:
        return right_match(keys, values, target, n_shared)
    return np.stack([right_match(*head, target, n_shared) for head in zip(keys, values, strict=True)])


def match_all_heads_together(keys: np.ndarray, values: np.ndarray, **rules: Any) -> Clustering:
    """As if batch rows were heads of one layer."""
    clustering = right_matching(*(array.reshape(-1, *array.shape[-2:]) for array in (keys, values)), **rules)
    return Clustering(*(x.reshape(*keys.shape[:-2], x.shape[-1]) for x in (clustering.labels, clustering.counts)))


def with_partial_chunk(keys: np.ndarray, values: np.ndarray, *, chunk_size: int = 256, **rules: Any) -> Clustering:
    tokens = keys.shape[-2]
    n_whole = tokens // chunk_size * chunk_size
    spans = ((slice(n_whole), chunk_size), (slice(n_whole, tokens), tokens - n_whole))
    arrays = [(keys[..., span, :], values[..., span, :], size) for span, size in spans if size]
    return joined([right_matching(*pair, chunk_size=size, **rules) for *pair, size in arrays])


def likeness_to_rounded_mean(array: np.ndarray) -> np.ndarray:
    mean = merge(array, Clustering(np.zeros(len(array), dtype=np.int64), np.array([len(array)])))
    return similarity(array.astype(np.float32), mean.astype(array.dtype).astype(np.float32))[:, 0]


def divided_by_window(keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    size, reach = keys.shape[-2], MODULE.WINDOW // 2
    inside = np.array([min(size, token + reach + 1) - max(0, token - reach) for token in range(size)])
    return right_distinctiveness(keys, values) * inside / MODULE.WINDOW


DISTINCTIVE = (
    Mistake(
        "values take no part in the scores: a token stands out by its key and by its value",
        "16.2",
        scored_by(lambda keys, values: right_distinctiveness(keys, np.zeros_like(values))),
    ),
    Mistake(
        "keys take no part in the scores: a token stands out by its key and by its value",
        "16.2",
        scored_by(lambda keys, values: right_distinctiveness(np.zeros_like(keys), values)),
    ),
    Mistake(
        "each head keeps tokens of its own: the heads of a layer are added and keep the same ones",
        "16.2",
        in_module("match_distinctive", match_each_head_alone),
    ),
    Mistake(
        "all leading axes are added: only the last of them is the heads of one layer",
        "16.1",
        tuple((place, "distinctive_matching", match_all_heads_together) for place in ("", "distinctive_matching")),
    ),
    Mistake(
        "the mean of a chunk is rounded to the dtype of the tokens: it is float32",
        "16.2",
        in_module("likeness_to_mean", likeness_to_rounded_mean),
    ),
    Mistake("scores are not averaged over neighbours: seven tokens count", "16.3", in_module("WINDOW", 1)),
    Mistake(
        "scores near the ends of a chunk are divided by seven: fewer tokens lie in the chunk there",
        "16.3",
        scored_by(divided_by_window),
    ),
    Mistake(
        "the tokens that stand out least stay exact: those of the largest scores do",
        "16.4",
        scored_by(lambda keys, values: -right_distinctiveness(keys, values)),
    ),
    Mistake(
        "ties between scores go to the last token: of equal scores the first stay exact",
        "16.4",
        matched_by(last_token=True),
    ),
    Mistake("the shared entries come first: the exact tokens do", "16.4", matched_by(shared_first=True)),
    Mistake(
        "the first ordinary tokens are destinations: they are evenly spaced",
        "16.4",
        matched_by(first_destinations=True),
    ),
    Mistake("ties between destinations go to the last: the first wins", "16.4", matched_by(last_destination=True)),
    Mistake("a destination joins an equal one before it: destinations stay", "16.4", matched_by(may_leave=True)),
    Mistake("n_shared is taken as it is: at most half of the target is shared", "16.4", matched_by(is_uncapped=True)),
)
IGNORED = (  # of a cache
    Mistake("n_shared is ignored: chunks are clustered by distinctive matching", "9.3", change=without("method")),
)
PARTIAL = (
    Mistake(
        "the trailing partial chunk is matched: it must stay as it is",
        "16.1",
        (("", "distinctive_matching", with_partial_chunk),),
    ),
)
OPERATION = Operation(
    name="distinctive_matching",
    section=16,
    results=("labels", "counts"),
    cases=cases,
    refused=refused,
    small=small,
    decisions=decisions,
    mistakes=(*SIMILARITY, *TARGET, *DISTINCTIVE, *PARTIAL),
    scaffold='''
def distinctive_matching(keys, values, *, keep_ratio, chunk_size=256, n_shared=4):
    """labels (..., tokens), counts (..., entries)."""
    return my_package.match_distinctive(keys, values, keep_ratio, chunk_size, n_shared)
''',
)
