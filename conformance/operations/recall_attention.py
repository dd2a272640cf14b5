"""`recall_attention`."""

from collections import namedtuple
from collections.abc import Iterator
from typing import Any

import numpy as np

from kvcluster.reference import Clusters, kmeans, select_clusters
from kvcluster.reference.recall import mean_deviations, mean_of_members, recalled_entries

from ..case import Case
from ..drawing import Drawing
from ..inputs import DTYPES, attention_arrays
from ..operation import Operation
from ..port import Port
from .attention import HEADS, WEIGHTS
from .select_clusters import SELECTION

__all__ = ["OPERATION"]

# What clusters look like to a port, whatever its arrays are.
PortClusters = namedtuple("PortClusters", ("labels", "counts", "centroids", "members", "first_member"))


def cases(base: int) -> Iterator[Case]:
    for index, dtype in enumerate(DTYPES):
        arrays = with_clusters(attention_arrays("smooth", (2,), 3, 90, 16, dtype, base + 100 + index), 11, 3)
        variants: dict[str, dict[str, Any]] = {f"budget{budget}": {"budget": budget} for budget in (1, 25, 90, 500)}
        variants |= {
            "scale": {"budget": 30, "scale": 0.7},
            "spread0": {"budget": 30, "spread": 0.0},
            "rest": {"budget": 30, "centroids_for_rest": True},
        }
        for name, parameters in variants.items():
            yield Case("recall_attention", f"{dtype}-{name}", arrays, parameters)


def with_clusters(arrays: dict[str, np.ndarray], n_clusters: int, max_iter: int) -> dict[str, np.ndarray]:
    clusters = kmeans(arrays["keys"], n_clusters=n_clusters, max_iter=max_iter)
    return {**arrays, "labels": clusters.labels, "counts": clusters.counts, "centroids": clusters.centroids}


def small(draw: Drawing) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    tokens = draw.integer(1, 6)
    arrays, parameters = draw.attention(tokens)
    return with_clusters(arrays, draw.integer(1, tokens), 2), {**parameters, "budget": draw.integer(1, tokens + 1)}


def positional(operation: Operation, port: Port, case: Case) -> list[Any]:
    labels, counts, centroids = (case.arrays[name] for name in ("labels", "counts", "centroids"))
    members, first_member = labels.argsort(axis=-1, kind="stable"), counts.cumsum(axis=-1) - counts
    clusters = PortClusters(*map(port.from_numpy, (labels, counts, centroids, members, first_member)))
    return [*(port.from_numpy(case.arrays[name]) for name in ("query", "keys", "values")), clusters]


def oracle(case: Case) -> tuple[Any, ...]:
    arrays, parameters = case.arrays, case.parameters
    clusters = Clusters(arrays["labels"], arrays["counts"], arrays["centroids"])
    selection = select_clusters(
        arrays["query"],
        clusters.centroids,
        clusters.counts,
        budget=parameters["budget"],
        deviations=mean_deviations(arrays["keys"], clusters),
        **{name: parameters[name] for name in ("spread",) if name in parameters},
    )
    mean_values = mean_of_members(arrays["values"], clusters) if parameters.get("centroids_for_rest") else None
    entries = recalled_entries(arrays["keys"], arrays["values"], clusters, selection, mean_values)
    return arrays["query"], *entries, parameters.get("scale")


OPERATION = Operation(
    name="recall_attention",
    section=12,
    results=("output",),
    cases=cases,
    refused=lambda: iter(()),
    small=small,
    positional=positional,
    oracle=oracle,
    mistakes=(*WEIGHTS, *HEADS, *SELECTION),
    scaffold='''
def recall_attention(query, keys, values, clusters, *, budget, scale=None):
    """(..., group, dim_value); clusters has .labels, .counts, .centroids, .members and .first_member."""
    return my_package.recall(query, keys, values, clusters, budget, scale)
''',
)
