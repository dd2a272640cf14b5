"""What canonical dot products of queries and the tokens of a chunk are compared with."""

from jaxtyping import Float64
from torch import Tensor

__all__ = ["largest_margins"]


def largest_margins(dots: Float64[Tensor, "chunks queries chunk"]) -> Float64[Tensor, "chunks chunk"]:
    """The most by which each token's dot product with a query surpasses the largest of all other tokens'."""
    (best, second), (place, _) = (x.unbind(dim=-1) for x in dots.topk(2, dim=-1))
    others = best.unsqueeze(-1).expand_as(dots).scatter(-1, place.unsqueeze(-1), second.unsqueeze(-1))
    return (dots - others).amax(dim=1)
