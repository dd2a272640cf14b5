"""Shares of KV heads, and their order, from what is lost with each of them: for models that have few.

With few heads a second reading tells too little: it asks for every token of a text, while answers ask for few. Here
each head in turn keeps a part of its tokens and all others everything, and the loss is looked at: how much worse the
model predicts the text that follows and the answers to questions about hidden sentences. Shares follow from that. The
order, of which the published method keeps the first heads whole, follows from the loss of that method when each head in
turn is the only whole one. All of it is our choice.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from kvcluster.fast.huggingface import ChelseaCache, ClusteredCache

from .shares import N_RECENT, N_SINK

__all__ = ["PARTS", "RATIO", "best_shares", "check_parts", "only_one", "only_whole", "order_by_worth"]

PARTS = (0.02, 0.05, 0.1, 0.2, 0.4, 0.7)  # of the tokens of the head that is compressed
STEPS = 100  # of a share
RATIO = 0.2  # entries / tokens of the heads that are not whole, by which heads are ordered: the published method's


def check_parts(parts: Sequence[float]) -> None:
    """Refuse parts at which no curve of losses can be measured."""
    if not parts or list(parts) != sorted(set(parts)) or not 0 < parts[0] <= parts[-1] < 1:
        raise ValueError(f"parts must be at least one number, ascending, in (0, 1), got {list(parts)}")


def only_one(model: Any, layer: int, head: int, part: float) -> ClusteredCache:
    """An empty cache in which one head keeps a part of its tokens, and every other head all."""
    config = model.config
    ratios: list[Any] = [1.0] * config.num_hidden_layers
    of_heads = [1.0] * config.num_key_value_heads
    of_heads[head] = part
    ratios[layer] = of_heads
    return ClusteredCache.for_model(model, keep_ratio=ratios, n_sink=N_SINK, n_recent=N_RECENT, profile=None)


def only_whole(model: Any, layer: int, head: int) -> ChelseaCache:
    """An empty cache of the published method in which one head keeps every token, and every other head a fifth.

    `ChelseaCache` with its own sizes, sinks and recent tokens among the fifth. Of short contexts it keeps more: what
    must stay exact, and one entry.
    """
    return ChelseaCache.for_model(model, ratio=RATIO, max_new_tokens=0, whole_heads=[(layer, head)])


def best_shares(losses: Float[np.ndarray, "heads parts"], parts: Sequence[float], keep: float) -> list[float]:
    """The part of its tokens that each head should keep, `keep` on average, so that the losses add up to least.

    Parameters
    ----------
    losses : of each head at each of `parts`, ascending in (0, 1); with all tokens there is none. Where a loss is above
        that of a smaller part, the higher one holds for both; between two parts it is interpolated, below the first it
        goes on as between the first two.

    Notes
    -----
    Losses of several heads are taken to add up. The best of all shares that are multiples of a hundredth, found by
    dynamic programming: heads * 100 * 100 * heads steps.

    Examples
    --------
    The second head loses nothing, so the first gets all it can:

    >>> best_shares(np.array([[1.0, 0.5], [0.0, 0.0]]), (0.25, 0.5), keep=0.5)
    [1.0, 0.0]
    """
    grid = np.arange(STEPS + 1) / STEPS
    total = round(keep * STEPS * len(losses))
    best = np.full(total + 1, np.inf)
    best[0] = 0.0
    choices = []
    for of_head in losses:
        curve = curve_of(of_head, parts, grid)
        options = np.full((total + 1, STEPS + 1), np.inf)  # hundredths so far, and of this head
        for part in range(min(STEPS, total) + 1):
            options[part:, part] = best[: total + 1 - part] + curve[part]
        choices.append(options.argmin(axis=1))
        best = options.min(axis=1)
    shares = []
    left = total
    for choice in reversed(choices):
        shares.append(int(choice[left]) / STEPS)
        left -= int(choice[left])
    return shares[::-1]


def curve_of(losses: Float[np.ndarray, " parts"], parts: Sequence[float], grid: np.ndarray) -> np.ndarray:
    """Losses at all of `grid`: never rising, 0 at 1."""
    known = np.maximum.accumulate(np.append(losses, 0.0)[::-1])[::-1]
    at = np.append(parts, 1.0)
    slope = (known[0] - known[1]) / (at[1] - at[0])
    return np.where(grid < at[0], known[0] + slope * (at[0] - grid), np.interp(grid, at, known))


def order_by_worth(losses: Float[np.ndarray, " heads"], heads: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The heads, those first with which least is lost when they alone stay whole; of equal ones the first.

    >>> order_by_worth(np.array([2.1, 1.5, 3.4]), [(5, 0), (11, 0), (17, 0)])
    [(11, 0), (5, 0), (17, 0)]
    """
    return [heads[place] for place in np.argsort(losses, kind="stable")]
