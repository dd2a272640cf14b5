"""Distinctive matching of all chunks at once."""

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from ..exact.distinctiveness import compress_by_scores as compress
from ..exact.distinctiveness import scores_by_likeness
from ..exact.mean import certified_mean, sums_are_exact
from ..exact.similarity import canonical_similarity

__all__ = ["compress", "likeness_to_mean", "scores"]

WORKING_BYTES = 4 * 2**20  # of float64 numbers that are scored together


def scores(
    keys: Float[Tensor, "*lead tokens dim"], values: Float[Tensor, "*lead tokens dim_value"], chunk_size: int
) -> Float64[Tensor, "layers chunks chunk"]:
    """How far each token of whole chunks stands out, for all heads of its layer together."""
    return scores_by_likeness(likeness_to_mean, keys, values, chunk_size)


def likeness_to_mean(tokens: Float[Tensor, "chunks chunk dim"]) -> Float64[Tensor, "chunks chunk"]:
    """Canonical similarity of each token to the centroid of its chunk."""
    chunks, size, _ = tokens.shape
    labels = torch.zeros(1, size, dtype=torch.int64, device=tokens.device)
    counts = torch.full((1, 1), size, dtype=torch.int64, device=tokens.device)
    likeness = torch.empty(chunks, size, dtype=torch.float64, device=tokens.device)
    together = max(1, WORKING_BYTES // (torch.float64.itemsize * tokens.shape[1:].numel()))
    for part, into in zip(tokens.split(together), likeness.split(together), strict=True):
        one_cluster = [x.expand(len(part), -1) for x in (labels, counts)]
        mean = certified_mean(part.double(), sums_are_exact(part), *one_cluster)  # (chunks, 1, dim)
        into.copy_(canonical_similarity(part, mean))
    return likeness
