"""What clustering has cost a cache so far."""

from dataclasses import astuple, dataclass

__all__ = ["ClusteringWork"]


@dataclass
class ClusteringWork:
    """Sums over all that was clustered.

    Attributes
    ----------
    n_rows : decisions (matches of sources, labels of tokens) in all rounds.
    n_scored_rows : of these, what the filter left open, so that canonical scores were needed.
    seconds : wall-clock time of clustering.
    """

    n_rows: int = 0
    n_scored_rows: int = 0
    seconds: float = 0.0

    def __add__(self, other: "ClusteringWork") -> "ClusteringWork":
        return ClusteringWork(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))

    def add(self, n_rows: int, n_scored_rows: int, seconds: float) -> None:
        """Count one more piece of work."""
        self.n_rows += n_rows
        self.n_scored_rows += n_scored_rows
        self.seconds += seconds
