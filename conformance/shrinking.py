"""The smallest counterexample that can be found: a few tokens, small numbers, to be checked by eye."""

import random
import warnings
from collections.abc import Callable
from typing import Any

import hypothesis
import numpy as np
from hypothesis import strategies as st
from hypothesis.errors import NoSuchExample
from hypothesis.extra.numpy import arrays

from kvcluster.reference import kmeans
from kvcluster.reference.chunks import entries_of_chunk

from .case import Case

__all__ = ["smallest_case"]

# Simple ones first: towards these examples are shrunk. The others show rounding, near ties and overflow.
NUMBERS = (0.0, 1.0, -1.0, 2.0, -2.0, 3.0, -0.0, 0.1, 1.0 + 2.0**-23, 1e6, 1e-20, 1e20)
MOST_EXAMPLES = 400


def smallest_case(operation: str, fails: Callable[[Case], bool], seed: int) -> Case | None:
    """The simplest case of `operation` for which `fails` holds; None if none is found among some hundreds."""
    settings = hypothesis.settings(
        max_examples=MOST_EXAMPLES,
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of NumPy, about the numbers above
        try:
            return hypothesis.find(small_cases(operation), fails, settings=settings, random=random.Random(seed))
        except NoSuchExample:
            return None


@st.composite
def small_cases(draw: st.DrawFn, operation: str) -> Case:
    """A case of few tokens, one leading index or two heads."""
    tokens, dim = draw(st.integers(1, 6)), draw(st.integers(1, 3))
    if operation in ("ClusteredCache", "RecallCache"):
        tokens = draw(st.integers(1, 14))
    if operation == "distinctive_matching":
        tokens = draw(st.integers(1, 9))
    heads = draw(st.integers(1, 2)) if operation == "distinctive_matching" else 1  # there they share their scores

    def rows(n: int) -> np.ndarray:
        return draw(numbers(heads, n, dim))

    def counts(n: int, least: int) -> np.ndarray:
        return np.array([draw(st.lists(st.sampled_from((*range(least, 4), 2049)), min_size=n, max_size=n))])

    keys = rows(tokens)
    made: dict[str, Any] = {}
    parameters: dict[str, Any] = {}
    if operation == "alternating_partition":
        parameters = {"size": draw(st.integers(0, 6))}
    elif operation == "similarity":
        made = {"a": keys, "b": rows(draw(st.integers(1, 3)))}
    elif operation == "chunked_soft_matching":
        parameters = {"keep_ratio": draw(ratios), "chunk_size": draw(st.integers(1, 6))}
        made = {"keys": keys}
    elif operation == "distinctive_matching":
        parameters = {"keep_ratio": draw(ratios), "chunk_size": draw(st.integers(1, 8))}
        parameters["n_shared"] = draw(st.integers(1, 3))
        made = {"keys": keys, "values": rows(tokens)}
    elif operation == "merge":
        labels = np.unique(draw(st.lists(st.integers(0, 2), min_size=tokens, max_size=tokens)), return_inverse=True)[1]
        made = {"array": keys, "labels": labels[None], "counts": np.bincount(labels)[None]}
    elif operation == "kmeans":
        parameters = {"n_clusters": draw(st.integers(1, tokens)), "max_iter": draw(st.integers(1, 3))}
        made = {"keys": keys}
    elif operation == "select_clusters":
        made = {"query": rows(draw(st.integers(1, 2))), "centroids": keys, "counts": counts(tokens, 0)}
        parameters = {"budget": draw(st.integers(0, 8))}
    else:
        made = {"query": rows(draw(st.integers(1, 2))), "keys": keys, "values": rows(tokens)}
        if draw(st.booleans()):
            parameters["scale"] = 2.0
    if operation == "clustered_attention":
        made["counts"] = counts(tokens, 1)
    if operation == "recall_attention":
        clusters = kmeans(keys, n_clusters=draw(st.integers(1, tokens)), max_iter=2)
        made |= {"labels": clusters.labels, "counts": clusters.counts, "centroids": clusters.centroids}
        parameters["budget"] = draw(st.integers(1, tokens + 1))
    if operation == "ClusteredCache":
        parameters |= {"keep_ratio": draw(ratios), "chunk_size": draw(st.integers(1, 4))}
        parameters |= {"n_sink": draw(st.integers(0, 2)), "n_recent": draw(st.integers(0, 3))}
        least = parameters["n_sink"] + parameters["n_recent"] + parameters["chunk_size"] - 1
        least += entries_of_chunk(parameters["keep_ratio"], parameters["chunk_size"])
        parameters |= draw(st.sampled_from(({}, {"n_shared": 1}, {"budget": least}, {"budget": least + 1})))
    if operation == "RecallCache":
        sizes = {name: draw(st.integers(0, 2)) for name in ("n_sink", "n_recent")}
        sizes |= {"segment_size": draw(st.integers(1, 3)), "tokens_per_cluster": draw(st.integers(1, 3))}
        least = sizes["n_sink"] + sizes["n_recent"] + sizes["segment_size"]
        prompt = draw(st.sampled_from((0, 3)))
        parameters |= {"budget": least + draw(st.integers(0, 4)), **sizes, "prompt_segment_size": prompt}
    if operation in ("ClusteredCache", "RecallCache"):
        cut = draw(st.integers(0, tokens))
        parameters["pieces"] = (tokens,) if cut == tokens else (cut, *[1] * (tokens - cut))
    return Case(operation, "smallest found", made, parameters)


ratios = st.sampled_from((1.0, 0.5, 0.75, 0.25, 0.2, 0.7))


def numbers(heads: int, rows: int, dim: int) -> st.SearchStrategy[np.ndarray]:
    return arrays(np.float32, (heads, rows, dim), elements=st.sampled_from([float(np.float32(x)) for x in NUMBERS]))
