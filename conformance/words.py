"""How the reference decides a small case, step by step, in words."""

from collections.abc import Iterator

import numpy as np

from kvcluster.reference import alternating_partition, merge, similarity
from kvcluster.reference.chunks import entries_of_chunk
from kvcluster.reference.cluster_scores import cluster_scores
from kvcluster.reference.distinctive_matching import distinctiveness, match_distinctive
from kvcluster.reference.merging import Clustering
from kvcluster.reference.soft_matching import match_round

from .case import Case

__all__ = ["decisions"]


def decisions(case: Case) -> list[str]:
    """Lines on the first leading index of a case; none for operations that decide nothing."""
    if case.operation == "chunked_soft_matching":
        return list(matching(case))
    if case.operation == "distinctive_matching":
        return list(distinctive(case))
    return list(selection(case)) if case.operation == "select_clusters" else []


def matching(case: Case) -> Iterator[str]:
    keys, chunk_size = case.arrays["keys"], case.parameters.get("chunk_size", 64)
    keys = keys[(0,) * (keys.ndim - 2)]
    target = entries_of_chunk(case.parameters["keep_ratio"], chunk_size)
    yield f"a chunk of {chunk_size} tokens becomes {target} entries"
    for chunk in range(len(keys) // chunk_size):
        tokens = keys[chunk * chunk_size : (chunk + 1) * chunk_size]
        labels, size = np.arange(chunk_size), chunk_size
        while size > target:
            n_merged = min(size // 2, size - target)
            centroids = merge(tokens, Clustering(labels, np.bincount(labels)))
            yield f"chunk {chunk}, {size} entries of which {n_merged} merge:"
            yield from matches(centroids, n_merged)
            labels = match_round(centroids, n_merged)[labels]
            size -= n_merged


def matches(centroids: np.ndarray, n_merged: int) -> Iterator[str]:
    """A line for each source: its destination, what ties with it, and whether it merges."""
    sources, destinations = alternating_partition(len(centroids))
    similarities = similarity(centroids[sources], centroids[destinations])
    best = similarities.max(axis=-1)
    merged = np.argsort(-best, kind="stable")[:n_merged]
    for index, source in enumerate(sources):
        tied = destinations[similarities[index] == best[index]]
        line = f"  source {source} matches destination {tied[0]} (similarity {best[index]:.17g})"
        if len(tied) > 1:
            line += f"; {', '.join(map(str, tied))} tie exactly: the smallest index wins"
        line += "; it merges" if index in merged else "; it stays"
        rivals = [sources[other] for other in range(len(sources)) if other != index and best[other] == best[index]]
        if rivals and (index in merged) != all(list(sources).index(other) in merged for other in rivals):
            line += f", and ties with source {', '.join(map(str, rivals))}: those of the smallest index merge"
        yield line


def distinctive(case: Case) -> Iterator[str]:
    """A line for each token of each chunk of one layer: its score, and where it goes in each head."""
    keys, values = (x[(0,) * max(0, x.ndim - 3)] for x in (case.arrays["keys"], case.arrays["values"]))
    chunk_size = case.parameters.get("chunk_size", 256)
    target = entries_of_chunk(case.parameters["keep_ratio"], chunk_size)
    n_shared = max(1, min(case.parameters.get("n_shared", 4), target // 2))
    yield f"a chunk of {chunk_size} tokens becomes {target} entries, the last {n_shared} of them shared"
    for chunk in range(keys.shape[-2] // chunk_size if target < chunk_size else 0):
        span = slice(chunk * chunk_size, (chunk + 1) * chunk_size)
        of_chunk = keys[..., span, :], values[..., span, :]
        scores, labels = distinctiveness(*of_chunk), match_distinctive(*of_chunk, target, n_shared)
        for token, score in enumerate(scores):
            entries = np.ravel(labels[..., token]).tolist()  # of each head
            where = "it stays exact, entry" if entries[0] < target - n_shared else "ordinary, in entry"
            yield f"chunk {chunk}, token {token} scores {score:.17g}: {where} {', '.join(map(str, entries))}"


def selection(case: Case) -> Iterator[str]:
    query, centroids, counts = (case.arrays[name] for name in ("query", "centroids", "counts"))
    deviations = case.arrays.get("deviations", np.zeros_like(centroids))
    scores = cluster_scores(query, centroids, counts, deviations, case.parameters.get("spread", 0.5))
    first = (0,) * (query.ndim - 2)
    left = case.parameters["budget"]
    for cluster in np.argsort(-scores[first], kind="stable"):
        taken = min(left, int(counts[first][cluster]))
        left -= taken
        yield f"cluster {cluster} scores {scores[first][cluster]:.17g}: {taken} of {counts[first][cluster]} tokens"
