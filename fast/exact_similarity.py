"""Canonical similarity on torch tensors: the bits of `kvcluster.reference.similarity`."""

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from .arguments import check_array

__all__ = ["halving_sum", "similarity"]


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
    return canonical_similarity(a, b)


def canonical_similarity(a: Tensor, b: Tensor) -> Tensor:
    """`similarity` without the checks."""
    a, b = a.double(), b.double()
    dot = halving_sum(a.unsqueeze(-2) * b.unsqueeze(-3))  # (..., m, n)
    norms = halving_sum(a * a).unsqueeze(-1) * halving_sum(b * b).unsqueeze(-2)  # (..., m, n), both squared
    return torch.where(norms == 0, 0.0, dot * dot.abs() / norms)


def halving_sum(terms: Float64[Tensor, "*lead dim"]) -> Float64[Tensor, "*lead"]:
    """Sum over the last axis: pad with zeros to a power of two, add halves until one is left."""
    half = 1 << (terms.shape[-1] - 1).bit_length()
    terms = torch.nn.functional.pad(terms, (0, half - terms.shape[-1]))
    while half > 1:
        half //= 2
        terms = terms[..., :half] + terms[..., half:]  # (..., half)
    return terms[..., 0]
