"""The online cache that keeps within a budget, on torch tensors."""

from dataclasses import replace
from typing import Any

from torch import Tensor

from .backends import Backend
from .cache import ClusteredCache
from .scalars import check_integer

__all__ = ["BoundedCache"]


class BoundedCache(ClusteredCache):
    """A `ClusteredCache` that stores at most `budget` entries: spans of its body are merged as tokens come.

    Defined, with parameters, attributes and errors, by `kvcluster.reference.BoundedCache`: the same bytes.
    """

    def __init__(
        self,
        *,
        budget: int,
        keep_ratio: float,
        chunk_size: int = 256,
        n_sink: int = 16,
        n_recent: int = 64,
        backend: Backend = "auto",
    ) -> None:
        super().__init__(
            keep_ratio=keep_ratio, chunk_size=chunk_size, n_sink=n_sink, n_recent=n_recent, backend=backend
        )
        self._rules = replace(self._rules, budget=check_integer("budget", budget, least=1))
        self.budget = self._rules.budget

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """As that of `ClusteredCache`, with the list `spans` among the numbers."""
        tensors, numbers = super().state()
        return tensors, {**numbers, "spans": list(self.spans)} if tensors else numbers
