"""Shares of heads by one threshold, and the order that follows from them."""

import numpy as np
import pytest
import torch
from agreement import equal_in_float64

from kvcluster.evaluation.tuning.shares import head_shares, order_heads

SIZES = {"n_sink": 2, "n_recent": 5}


def by_ranking(scores, *, keep, n_sink, n_recent, has_own_thresholds=False):
    """In plain NumPy: the body's best, ties to the first, counted for each head."""
    body = scores[..., n_sink : scores.shape[-1] - n_recent]
    groups = body.reshape(-1, body.shape[-1]) if has_own_thresholds else body.reshape(1, -1)
    is_above = np.zeros(groups.shape)
    for row, group in enumerate(groups):
        best = sorted(range(len(group)), key=lambda place: (-group[place], place))
        is_above[row, best[: int(keep * len(group))]] = 1
    return is_above.reshape(body.shape).mean(axis=-1)


def random_scores(seed=0, levels=2**20):
    """Scores (5 layers, 3 heads, 40 tokens); heads differ, and few `levels` make ties."""
    rng = np.random.default_rng(seed)
    scores = rng.random((5, 3, 40)) ** rng.uniform(0.2, 8, (5, 3, 1))
    return (np.ceil(scores * levels) / levels).astype(np.float32)


@pytest.mark.parametrize("levels", [2**20, 4])
@pytest.mark.parametrize("keep", [0.1, 0.25, 1])
def test_shares_are_those_of_a_ranking_of_all_scores(keep, levels):
    scores = random_scores(levels=levels)
    shares = head_shares(torch.from_numpy(scores), keep=keep, **SIZES).numpy()
    assert equal_in_float64(shares, by_ranking(scores, keep=keep, **SIZES))
    assert ((shares >= 0) & (shares <= 1)).all()
    assert round(shares.sum() * 33) == int(keep * 5 * 3 * 33)
    mistakes = [{"n_sink": 0}, {"n_recent": 0}, {"has_own_thresholds": True}, {"keep": 0.5}]
    for mistake in mistakes if keep < 1 else mistakes[-1:]:
        assert not equal_in_float64(shares, by_ranking(scores, **{"keep": keep} | SIZES | mistake)), mistake


def test_heads_are_ordered_by_share_and_then_by_place():
    shares = torch.tensor([[0.5, 0.25, 0.5], [0.75, 0.5, 0.25]])
    assert order_heads(shares, [3, 8]) == [(8, 0), (3, 0), (3, 2), (8, 1), (3, 1), (8, 2)]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"keep": 0}, "keep must be in \\(0, 1\\], got 0"),
        ({"keep": 1.5}, "keep must be in \\(0, 1\\], got 1.5"),
        ({"n_recent": 38}, "tokens must be more than 2 sinks and 38 recent ones, got 40"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        head_shares(torch.from_numpy(random_scores()), **SIZES | given)
