"""Canonical similarity on torch tensors."""

from jaxtyping import Float, Float64
from torch import Tensor

from .arguments import check_array
from .exact.similarity import canonical_similarity

__all__ = ["similarity"]


def similarity(a: Float[Tensor, "*lead m dim"], b: Float[Tensor, "*lead n dim"]) -> Float64[Tensor, "*lead m n"]:
    """Signed squared cosine of every row of `a` (..., m, dim) with every row of `b` (..., n, dim), float64.

    Defined, with its errors, by `kvcluster.reference.similarity`. Holds `m * n * dim` float64 numbers at once.
    """
    check_array("a", a)
    check_array("b", b)
    if a.shape[:-2] != b.shape[:-2] or a.shape[-1] != b.shape[-1]:
        raise ValueError(
            f"a and b must have the same leading axes and dim, got a {tuple(a.shape)} and b {tuple(b.shape)}"
        )
    return canonical_similarity(a.unsqueeze(-2), b.unsqueeze(-3))
