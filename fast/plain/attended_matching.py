"""By how much tokens surpass all others of their chunk for the queries of later tokens, in plain torch."""

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from ..exact.margins import largest_margins
from ..exact.similarity import halving_sum

__all__ = ["attention_margins"]

WORKING_BYTES = 4 * 2**20  # of float64 products that are added together


def attention_margins(
    keys: Float[Tensor, "chunks chunk dim"], queries: Float[Tensor, "chunks queries dim"]
) -> Float64[Tensor, "chunks chunk"]:
    """The most by which each token's dot product with a query surpasses the largest of all other tokens' of its chunk.

    With the bits of `kvcluster.reference`: products are exact in float64, sums over the features are halving sums.
    """
    chunks, size, dim = keys.shape
    margins = torch.full((chunks, size), -torch.inf, dtype=torch.float64, device=keys.device)
    together = max(1, WORKING_BYTES // (torch.float64.itemsize * size * dim))
    parts = zip(keys.split(together), queries.split(together), margins.split(together), strict=True)
    for some_keys, some_queries, into in parts:
        wide = some_keys.double()
        for query in some_queries.double().unbind(dim=1):  # (chunks, dim)
            dots = halving_sum(wide * query.unsqueeze(1))  # (chunks, chunk)
            torch.maximum(into, largest_margins(dots.unsqueeze(1)), out=into)
    return margins
