"""Shares of KV heads from the scores of a second reading: one threshold over all heads shares out what is kept."""

import torch
from jaxtyping import Float, Float32, Float64
from torch import Tensor

__all__ = ["KEEP", "KEEPS", "N_RECENT", "N_SINK", "check_body", "head_shares", "order_heads"]

KEEPS = (0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.75, 0.9)  # of all scores, those above a threshold
KEEP = 0.25  # by which heads are ordered
N_SINK, N_RECENT = 4, 252  # always kept, as a `ClusteredCache` has them by default


def head_shares(
    scores: Float32[Tensor, "layers kv_heads tokens"],
    *,
    keep: float = KEEP,
    n_sink: int = N_SINK,
    n_recent: int = N_RECENT,
) -> Float64[Tensor, "layers kv_heads"]:
    """The part of each head's body tokens that is above one threshold over all layers, heads and body tokens.

    Parameters
    ----------
    scores : of a second reading.
    keep : the part of all of them that is above the threshold, rounded down, in (0, 1].
    n_sink, n_recent : first and last tokens, which are kept whatever their scores are and do not count.

    Raises
    ------
    ValueError : `keep` out of range; no tokens between the sinks and the recent ones.

    Notes
    -----
    Of equal scores those of the first layer, head and token are above. The rule is our choice.

    Examples
    --------
    One layer of two heads and four tokens, the first of which is a sink. The three highest of the other six scores are
    0.9, 0.8 and 0.5:

    >>> head_shares(torch.tensor([[[0.1, 0.9, 0.8, 0.2], [0.7, 0.1, 0.5, 0.3]]]), keep=0.5, n_sink=1, n_recent=0)
    tensor([[0.6667, 0.3333]], dtype=torch.float64)
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep must be in (0, 1], got {keep}")
    n_tokens = scores.shape[-1]
    check_body(n_tokens, n_sink=n_sink, n_recent=n_recent)
    body = scores[..., n_sink : n_tokens - n_recent]
    order = body.flatten().sort(descending=True, stable=True).indices
    is_above = torch.zeros(body.numel(), dtype=torch.float64, device=body.device)
    is_above[order[: int(keep * body.numel())]] = 1
    return is_above.reshape(body.shape).mean(dim=-1)


def check_body(n_tokens: int, *, n_sink: int = N_SINK, n_recent: int = N_RECENT) -> None:
    """Refuse a context with no tokens between the sinks and the recent ones."""
    if n_tokens <= n_sink + n_recent:
        raise ValueError(f"tokens must be more than {n_sink} sinks and {n_recent} recent ones, got {n_tokens}")


def order_heads(shares: Float[Tensor, "layers kv_heads"], layers: list[int]) -> list[tuple[int, int]]:
    """All heads as (layer, KV head), those of the largest share first, of equal ones those of the first layer and head.

    `layers` are the indices of the layers in the model.

    >>> order_heads(torch.tensor([[0.2, 0.9], [0.2, 0.5]]), [5, 11])
    [(5, 1), (11, 1), (5, 0), (11, 0)]
    """
    order = shares.flatten().sort(descending=True, stable=True).indices.tolist()
    kv_heads = shares.shape[1]
    return [(layers[place // kv_heads], place % kv_heads) for place in order]
