"""What the recall benchmark compares: names, and how to make each for one layer."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from benchmarks.recall.methods import Exact, Full, Pages, Recall, Ruled, TopTokens, best_above_mean
from kvcluster.fast import RecallCache

__all__ = ["BUDGETS", "FULL", "OURS", "PAGES", "PAPER", "SETTINGS", "TOP", "Setting"]

BUDGETS = (128, 256, 512, 1024)
SMALL, MIDDLE = (128,), (512,)  # where ours, and the paper's settings, leave room for an option to show
FULL, TOP, OURS, PAPER, PAGES = "full cache", "exact top tokens", "ours", "the paper's settings", "pages (Quest)"
# 80 tokens a cluster, the whole prompt at once, centroids alone; the rule for a group is ours in all of them.
AS_PUBLISHED = {"tokens_per_cluster": 80, "prompt_segment_size": None, "max_iter": 10, "spread": 0.0}


@dataclass(frozen=True)
class Setting:
    """`make(exact, budget)` for each layer but the first `n_dense`, which attend to all tokens."""

    name: str
    make: Callable[[Exact, int], Full]
    budgets: tuple[int, ...] = BUDGETS
    n_dense: int = 0
    parameters: dict[str, Any] = field(default_factory=dict)

    def of_layer(self, exact: Exact, layer: int, budget: int) -> Full:
        return Full(exact) if layer < self.n_dense else self.make(exact, budget)


def recall(name: str, *, budgets: tuple[int, ...] = BUDGETS, n_dense: int = 0, **parameters: Any) -> Setting:
    """`RecallCache` with its defaults but for `parameters`."""
    return Setting(
        name,
        lambda exact, budget: Recall(exact, RecallCache(budget=budget, **parameters)),
        budgets,
        n_dense,
        parameters,
    )


def ruled(
    name: str,
    *,
    combine: Callable[[Tensor], Tensor] = best_above_mean,
    mass: float = 1.0,
    budgets: tuple[int, ...] = SMALL,
    **parameters: Any,
) -> Setting:
    """Clusters of `RecallCache`, taken by another rule."""
    return Setting(
        name,
        lambda exact, budget: Ruled(exact, RecallCache(budget=budget, **parameters), combine, mass),
        budgets,
        parameters=parameters,
    )


SETTINGS = [
    Setting(FULL, lambda exact, budget: Full(exact), (0,)),
    Setting(TOP, TopTokens),
    recall(OURS),
    recall(PAPER, n_dense=2, **AS_PUBLISHED),
    Setting(PAGES, lambda exact, budget: Pages(exact, budget, best_above_mean)),
    Setting("pages, summed over the group", lambda exact, budget: Pages(exact, budget, lambda x: x.sum(-2)), MIDDLE),
    recall("paper, no dense layers", budgets=MIDDLE, **AS_PUBLISHED),
    recall("paper + 8 tokens a cluster", budgets=MIDDLE, **AS_PUBLISHED | {"tokens_per_cluster": 8}),
    recall("paper + segments of 512", budgets=MIDDLE, **AS_PUBLISHED | {"prompt_segment_size": 512}),
    recall("paper + centred keys", budgets=MIDDLE, **AS_PUBLISHED, is_centred=True),
    recall("paper + spread", budgets=MIDDLE, **AS_PUBLISHED | {"spread": 0.5}),
    recall("paper + centroids for the rest", budgets=MIDDLE, **AS_PUBLISHED, centroids_for_rest=True),
    ruled("paper + mass 0.95", budgets=MIDDLE, **AS_PUBLISHED, mass=0.95),
    recall("ours, first two layers dense", budgets=SMALL, n_dense=2),
    recall("ours without spread", budgets=SMALL, spread=0.0),
    recall("ours, whole prompt at once", budgets=SMALL, prompt_segment_size=None),
    recall("ours, 16 tokens a cluster", budgets=SMALL, tokens_per_cluster=16),
    recall("ours, 80 tokens a cluster", budgets=SMALL, tokens_per_cluster=80),
    recall("ours + centred keys", budgets=SMALL, is_centred=True),
    *(recall(f"ours in {bits} bits", budgets=SMALL, bits=bits) for bits in (8, 4, 2)),
    recall("ours + centroids for the rest", budgets=SMALL, centroids_for_rest=True),
    ruled("ours + mass 0.95", mass=0.95),
    ruled("ours, group by largest product", combine=lambda x: x.amax(-2)),
    ruled("ours, group by sum", combine=lambda x: x.sum(-2)),
    ruled("ours, group by attention share", combine=lambda x: (x * 64**-0.5).softmax(-1).sum(-2)),
]
