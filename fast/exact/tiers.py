"""What changes in a fast tier in one step."""

from typing import NamedTuple

from torch import Tensor

__all__ = ["Exact", "Replaced"]


class Replaced(NamedTuple):
    """Which clusters a fast tier holds once it has dropped what is old, and which have to come.

    Attributes
    ----------
    first_row : (problems, clusters), int64: where each cluster begins; -1 if it is not there.
    last_step : (problems, clusters), int64: when it was selected last.
    sizes : (problems, clusters), int64: its tokens if it has to come, else 0.
    n_asked, n_hits, n_evicted : clusters selected in this step, of these those held, clusters dropped.
    """

    first_row: Tensor
    last_step: Tensor
    sizes: Tensor
    n_asked: int
    n_hits: int
    n_evicted: int


class Exact(NamedTuple):
    """Exact tokens that have to be copied: rows `first` to `end` of the fast tier.

    Attributes
    ----------
    n_sink, n_body : of slow memory, where sinks come first, then the body, then recent tokens.
    """

    first: int
    end: int
    n_sink: int
    n_body: int
