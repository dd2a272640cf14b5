"""The settings of a recall cache, and what follows from them: which tokens are clustered together, and when."""

from dataclasses import dataclass

from ..exact.quantization import check_bits_of_entries, plain_bits
from ..scalars import check_integer, check_seed, check_share

__all__ = ["RecallSettings"]

MOST_KEPT = 512  # tokens of a segment that are kept to undo it


@dataclass(frozen=True)
class RecallSettings:
    """Parameters, with their defaults and errors, as in `kvcluster.reference.RecallCache`."""

    budget: int
    n_sink: int = 16
    n_recent: int = 1
    tokens_per_cluster: int = 8
    segment_size: int | None = None
    prompt_segment_size: int | None = 512
    max_iter: int = 4
    is_centred: bool = False
    spread: float = 0.5
    centroids_for_rest: bool = False
    init_seed: int | None = None
    is_per_query_head: bool = False
    is_exact_counted: bool = True
    bits: int | tuple[int, int] = 16

    @property
    def of_bits(self) -> tuple[int, int] | None:
        """Bits of keys and of values; None for 16."""
        return check_bits_of_entries(self.bits, chunk_size=1)

    @classmethod
    def as_published(cls, *, budget: int, seed: int = 0) -> "RecallSettings":
        """Those of the paper, see `kvcluster.reference.RecallCache.as_published`."""
        return cls(
            budget=budget,
            n_recent=0,
            tokens_per_cluster=80,
            segment_size=320,
            prompt_segment_size=None,
            max_iter=1000,
            spread=0.0,
            init_seed=seed,
            is_per_query_head=True,
            is_exact_counted=False,
        )

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
        self._keep_integer("max_iter", least=1)
        object.__setattr__(self, "spread", check_share("spread", self.spread))
        if self.init_seed is not None:
            object.__setattr__(self, "init_seed", check_seed("init_seed", self.init_seed))
        check_bits_of_entries(self.bits, chunk_size=1)
        object.__setattr__(self, "bits", plain_bits(self.bits))

    def _keep_integer(self, name: str, least: int) -> None:
        """Put Python's own int in the place of what was given."""
        object.__setattr__(self, name, check_integer(name, getattr(self, name), least=least))

    def sizes(self, leaving: int, *, is_first: bool) -> list[int]:
        """Sizes of the segments, in order, of `leaving` tokens that are older than the recent ones."""
        if is_first and self.prompt_segment_size != 0:
            size = self.prompt_segment_size or max(1, leaving)
            last = leaving % size
            return [size] * (leaving // size) + [last] * (last > 0)
        return [self.segment_size] * (leaving // self.segment_size)

    def n_for_good(self, sizes: list[int], n_tokens: int) -> int:
        """Of segments of these sizes, those that are older than all in which the last `n_tokens` tokens are.

        All of them if these are large: then too much would have to be kept to undo them.
        """
        n_last, n_old = 0, len(sizes)
        while n_old and n_last < n_tokens:
            n_old -= 1
            n_last += sizes[n_old]
        return n_old if n_last <= n_tokens + MOST_KEPT else len(sizes)

    def budget_of_body(self, n_exact: int) -> int:
        """Tokens of the body that are recalled beside `n_exact` sinks and recent tokens, if there are so many."""
        return self.budget - n_exact if self.is_exact_counted else self.budget

    def fewest_seen(self, n_clustered: int) -> int:
        """Fewest tokens of which so many are clustered."""
        return 0 if n_clustered == 0 else self.n_sink + n_clustered + self.n_recent

    def n_clusters(self, size: int) -> int:
        """Clusters of a segment of `size` tokens."""
        return -(-size // self.tokens_per_cluster)
