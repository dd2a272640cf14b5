"""The scores of distinctive matching in C++."""

import ctypes

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from ..exact.distinctiveness import scores_by_likeness
from .compiling import library, pointers
from .layout import DTYPES

__all__ = ["likeness_to_mean", "scores"]


def scores(
    keys: Float[Tensor, "*lead tokens dim"], values: Float[Tensor, "*lead tokens dim_value"], chunk_size: int
) -> Float64[Tensor, "layers chunks chunk"]:
    """As `kvcluster.fast.plain.distinctive_matching.scores`; dim and dim_value must be multiples of LANES."""
    return scores_by_likeness(likeness_to_mean, keys, values, chunk_size)


def likeness_to_mean(tokens: Tensor) -> Tensor:
    """Canonical similarity of tokens (problems, size, dim) to the centroid of their problem, (problems, size) float64.

    dim must be a multiple of LANES. Copied where features do not lie side by side.
    """
    problems, size, dim = tokens.shape
    tokens = tokens if tokens.stride(-1) == 1 else tokens.contiguous()
    result = tokens.new_empty(problems, size, dtype=torch.float64)
    shape = (problems, size, dim, torch.get_num_threads(), *tokens.stride()[:2])
    getattr(library("distinctive"), f"kvcluster_likeness_{DTYPES[tokens.dtype]}")(
        (ctypes.c_int64 * len(shape))(*shape), *pointers(tokens, result)
    )
    return result
