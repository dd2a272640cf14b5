"""One step of a recall cache: attention to what a group of query heads takes together, or each of them alone."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ..backends import cell
from ..exact.entries import Reached, entries_at, places_of
from .body_clusters import BodyClusters

__all__ = ["RecallStep"]


@dataclass(frozen=True, eq=False)
class RecallStep:
    """What is attended to.

    Attributes
    ----------
    body : the clusters.
    reached : where the tokens lie, of the clusters at least those of which some are taken.
    taken : as `BodyClusters.take` gives them; None while there is no body.
    n_recalled : tokens that each choice takes.
    """

    body: BodyClusters
    reached: Reached
    taken: Sequence[Tensor] | None
    n_recalled: int

    def attend(self, query: Float[Tensor, "problems group dim"], scale: float) -> Tensor:
        """Output (problems, group, dim_value)."""
        attend = cell("attend_recalled", self.body.backend)
        if self.taken is None:
            output: Tensor = attend(query, self.reached, None, 0, None, scale)
            return output
        choices = zip(self.body.choosing_together(query), self.taken, strict=True)
        outputs = [attend(q, self.reached, of, self.n_recalled, self.body.rest(of), scale) for q, of in choices]
        return torch.cat(outputs, dim=1)

    def entries(self) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values and counts (problems, entries, .), or (problems, group, entries, .) if query heads choose."""
        if self.taken is None:
            return self._entries_of(None)
        keys, values, counts = zip(*map(self._entries_of, self.taken), strict=True)
        return self.body.joined(keys), self.body.joined(values), self.body.joined(counts)

    def _entries_of(self, taken: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        places = places_of(self.reached, taken, self.n_recalled)
        return entries_at(self.reached.keys, self.reached.values, places, self.body.rest(taken))
