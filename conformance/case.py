"""The input of one call of the conformance suite."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import numpy as np

__all__ = ["Case"]


@dataclass(frozen=True, eq=False)
class Case:
    """The input of one call.

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
    def written_parameters(self) -> dict[str, Any]:
        """The parameters as files have them: tuples become lists, a method becomes its own parameters."""
        written: dict[str, Any] = {}
        for name, value in self.parameters.items():
            if dataclasses.is_dataclass(value) and not isinstance(value, type):
                written |= dataclasses.asdict(value)
            else:
                written[name] = list(value) if isinstance(value, tuple) else value
        return written
