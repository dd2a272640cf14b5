"""What one call of the conformance suite gets."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

__all__ = ["OPERATIONS", "Case"]

OPERATIONS = (
    "alternating_partition",
    "similarity",
    "chunked_soft_matching",
    "distinctive_matching",
    "merge",
    "attention",
    "clustered_attention",
    "ClusteredCache",
    "kmeans",
    "select_clusters",
    "recall_attention",
    "RecallCache",
)


@dataclass(frozen=True, eq=False)
class Case:
    """What one call gets.

    Attributes
    ----------
    operation : a public name of `kvcluster.reference`.
    name : unique within the operation.
    arrays : arguments that are arrays. `labels`, `counts` and `centroids` make up one argument where the operation
        takes a `Clustering` or `Clusters`. Caches get `keys`, `values` in pieces, then `query`.
    parameters : the other arguments; `pieces`, of caches, are the numbers of tokens of each append.
    is_refused : whether the call must raise ValueError or TypeError.
    """

    operation: str
    name: str
    arrays: dict[str, np.ndarray]
    parameters: dict[str, Any] = field(default_factory=dict)
    is_refused: bool = False

    @property
    def has_option(self) -> bool:
        """Whether it asks a `ClusteredCache` for what not every implementation has: a budget, or shared entries."""
        return self.operation == "ClusteredCache" and bool({"budget", "n_shared"} & set(self.parameters))
