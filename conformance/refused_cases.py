"""Calls that must raise."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from .case import Case
from .inputs import make_array

__all__ = ["refused"]


def refused(operation: str) -> Iterator[Case]:
    """Calls that must raise: no number, no finite number, a wrong dtype, shapes that do not fit, out of range."""
    keys = make_array("normal", (1, 8, 4), "f32", 1)
    nan, infinite, double = keys.copy(), keys.copy(), keys.astype(np.float64)
    nan[0, 3, 1], infinite[0, 0, 0] = np.nan, np.inf
    bad = {"nan": nan, "infinity": infinite, "float64": double}
    good: dict[str, Any] = {"query": keys[:, :2], "keys": keys, "values": keys}
    if operation in ("attention", "clustered_attention"):
        more = {"counts": np.ones((1, 8), int)} if operation == "clustered_attention" else {}
        for name, array in bad.items():
            yield Case(operation, f"refused-{name}", {**good, "values": array, **more}, is_refused=True)
        yield Case(operation, "refused-shapes", {**good, "values": keys[:, :7], **more}, is_refused=True)
    if operation == "chunked_soft_matching":
        for name, array in bad.items():
            yield Case(operation, f"refused-{name}", {"keys": array}, {"keep_ratio": 0.5, "chunk_size": 4}, True)
        for keep_ratio in (0.0, 1.5):
            yield Case(operation, f"refused-keep{keep_ratio}", {"keys": keys}, {"keep_ratio": keep_ratio}, True)
        yield Case(operation, "refused-chunk0", {"keys": keys}, {"keep_ratio": 0.5, "chunk_size": 0}, True)
    if operation == "distinctive_matching":
        rule: dict[str, Any] = {"keep_ratio": 0.5, "chunk_size": 4}
        for name, array in bad.items():
            yield Case(operation, f"refused-{name}", {"keys": keys, "values": array}, rule, True)
        yield Case(operation, "refused-shapes", {"keys": keys, "values": keys[:, :7]}, rule, True)
        for name, value in (("keep_ratio", 1.5), ("chunk_size", 0), ("n_shared", 0)):
            yield Case(operation, f"refused-{name}", {"keys": keys, "values": keys}, {**rule, name: value}, True)
    if operation == "merge":
        labels, counts = np.zeros((1, 8), int), np.array([[8]])
        for name, array in bad.items():
            arrays = {"array": array, "labels": labels, "counts": counts}
            yield Case(operation, f"refused-{name}", arrays, is_refused=True)
        yield Case(operation, "refused-counts", {"array": keys, "labels": labels, "counts": counts - 1}, {}, True)
    if operation == "kmeans":
        for name, array in bad.items():
            yield Case(operation, f"refused-{name}", {"keys": array}, {"n_clusters": 2}, True)
        for n_clusters in (0, 9):
            yield Case(operation, f"refused-K{n_clusters}", {"keys": keys}, {"n_clusters": n_clusters}, True)
    if operation == "select_clusters":
        arrays = {"query": keys[:, :2], "centroids": keys, "counts": np.ones((1, 8), int)}
        for name, array in bad.items():
            yield Case(operation, f"refused-{name}", {**arrays, "centroids": array}, {"budget": 3}, True)
        yield Case(operation, "refused-budget", arrays, {"budget": -1}, True)
    if operation in ("ClusteredCache", "RecallCache"):
        rule = {"keep_ratio": 0.5} if operation == "ClusteredCache" else {"budget": 20, "n_sink": 2}
        for name, array in bad.items():
            yield Case(operation, f"refused-{name}", {**good, "keys": array}, {**rule, "pieces": (8,)}, True)
        wrong = {"keep_ratio": 2.0} if operation == "ClusteredCache" else {"budget": 0}
        yield Case(operation, "refused-parameter", good, {**wrong, "pieces": (8,)}, True)
    if operation == "ClusteredCache":
        rule = {"keep_ratio": 0.5, "chunk_size": 2, "n_sink": 1, "n_recent": 2, "pieces": (8,)}
        for name, limits in (
            ("budget", {"budget": 4}),  # one too few
            ("shared", {"n_shared": 0}),
            ("budget-and-shared", {"budget": 20, "n_shared": 1}),
        ):
            yield Case(operation, f"refused-{name}", good, {**rule, **limits}, True)
