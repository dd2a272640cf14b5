"""The tokens at which k-means begins, drawn as `kvcluster.reference.sampling` defines it."""

import torch
from jaxtyping import Int64
from torch import Tensor

__all__ = ["sample_tokens"]

MASK = 2**32 - 1
STEP, FACTOR = 0x9E3779B9, 0x45D9F3B  # 32 bits times FACTOR fit into int64: no product overflows


def sample_tokens(
    n_tokens: int,
    n_drawn: int,
    *,
    seed: int,
    heads: Int64[Tensor, " problems"],
    starts: Int64[Tensor, " segments"],
) -> Int64[Tensor, "problems segments n_drawn"]:
    """The reference's `sample_tokens` of every head and start."""
    seeded = scramble(torch.zeros_like(heads), torch.full_like(heads, seed))
    state = scramble(scramble(seeded, heads)[:, None, None], starts[:, None])
    numbers = scramble(state, torch.arange(n_tokens, device=heads.device))  # (problems, segments, n_tokens)
    return numbers.argsort(dim=-1)[..., :n_drawn].sort(dim=-1).values


def scramble(state: Tensor, word: Tensor) -> Tensor:
    """32 bits that depend on both; different ones for different words below 2**32."""
    bits = (state + word + STEP) & MASK
    for _ in range(2):
        bits = ((bits ^ (bits >> 16)) * FACTOR) & MASK
    return bits ^ (bits >> 16)
