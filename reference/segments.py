"""Segments: which tokens of a recall cache are clustered together, and when."""

from dataclasses import dataclass

from .arguments import check_integer

__all__ = ["SegmentPlan"]


@dataclass(frozen=True)
class SegmentPlan:
    """Which tokens are clustered together, and when; parameters and errors as in `RecallCache`.

    Examples
    --------
    A prompt of 50 tokens after the sinks; then single tokens until 10 of them are older than the newest:

    >>> plan = SegmentPlan(27, n_sink=16, n_recent=1, tokens_per_cluster=4, segment_size=10, prompt_segment_size=20)
    >>> plan.sizes(50, is_first=True), plan.sizes(9, is_first=False), plan.sizes(10, is_first=False)
    ([20, 20, 10], [], [10])
    >>> plan.n_clusters(10)
    3
    """

    budget: int
    n_sink: int
    n_recent: int
    tokens_per_cluster: int
    segment_size: int | None
    prompt_segment_size: int | None
    is_exact_counted: bool = True

    def __post_init__(self) -> None:
        self._keep_integer("budget", least=1)
        self._keep_integer("n_sink", least=0)
        self._keep_integer("n_recent", least=0)
        self._keep_integer("tokens_per_cluster", least=1)
        if self.prompt_segment_size is not None:
            self._keep_integer("prompt_segment_size", least=0)
        if self.segment_size is None:
            half = (self.budget - self.n_sink - self.n_recent) // 2
            object.__setattr__(self, "segment_size", max(1, min(320, half)) if self.is_exact_counted else 320)
        self._keep_integer("segment_size", least=1)
        if self.is_exact_counted and self.budget < self.n_sink + self.n_recent + self.segment_size:
            raise ValueError(
                "budget must be at least n_sink + n_recent + segment_size, which may all be attended to at once, "
                f"got {self.budget} < {self.n_sink} + {self.n_recent} + {self.segment_size}"
            )

    def _keep_integer(self, name: str, least: int) -> None:
        """Put Python's own int in the place of what was given."""
        object.__setattr__(self, name, check_integer(name, getattr(self, name), least=least))

    def sizes(self, leaving: int, *, is_first: bool) -> list[int]:
        """Sizes of the segments, in order, of `leaving` tokens that are older than the recent ones.

        Tokens left over stay unclustered until more have gathered; with `prompt_segment_size` not 0, the first append
        leaves none over.
        """
        if is_first and self.prompt_segment_size != 0:
            size = self.prompt_segment_size or max(1, leaving)
            last = leaving % size
            return [size] * (leaving // size) + [last] * (last > 0)
        return [self.segment_size] * (leaving // self.segment_size)

    def budget_of_body(self, n_exact: int) -> int:
        """Tokens of the body that are recalled beside `n_exact` sinks and recent tokens, if there are so many."""
        return self.budget - n_exact if self.is_exact_counted else self.budget

    def n_clusters(self, size: int) -> int:
        """Clusters of a segment of `size` tokens."""
        return -(-size // self.tokens_per_cluster)
