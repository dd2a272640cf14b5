"""A decoding step of the recall cache in C++."""

import ctypes

import torch
from torch import Tensor

from . import DTYPES
from .compiling import library

__all__ = ["attend_body", "take"]


def take(probe: Tensor, features: Tensor, mean: Tensor, largest: Tensor, counts: Tensor, budget: int) -> Tensor:
    """Tokens taken of each cluster (problems, clusters), int64.

    Parameters
    ----------
    probe : (problems, group, 2 * dim), float32: queries, then how far they reach.
    features : (problems, clusters, 2 * dim), bfloat16; mean : (problems, 1, 2 * dim), float32.
    largest : (problems, 2), float32; counts : (problems, clusters), int64.
    """
    problems, group, dims = probe.shape
    taken = torch.empty_like(counts)
    shape = (problems, group, dims // 2, counts.shape[1], budget, torch.get_num_threads())
    call("take", shape, probe, features, mean, largest, counts, taken)
    return taken


def attend_body(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    first_member: Tensor,
    taken: Tensor,
    *,
    n_sink: int,
    n_exact: int,
    n_body: int,
    scale: float,
) -> Tensor:
    """Attention (problems, group, dim), in the dtype of `query`, to `n_exact` exact tokens and the recalled ones.

    Parameters
    ----------
    query : (problems, group, dim).
    keys, values : (problems, room, dim), contiguous: `n_sink` sinks, `n_body` tokens in cluster order, recent tokens.
    first_member, taken : (problems, clusters), int64: where each cluster begins in the body; tokens taken of it.
    """
    problems, group, dim = query.shape
    scaled = (query.float() * scale).contiguous()
    output = torch.empty_like(scaled)
    shape = (problems, group, dim, keys.shape[1], n_sink, n_exact, n_body, taken.shape[1], torch.get_num_threads())
    call(f"attend_body_{DTYPES[keys.dtype]}", shape, scaled, keys, values, first_member, taken, output)
    return output.to(query.dtype)


def call(name: str, shape: tuple[int, ...], *arrays: Tensor) -> None:
    """`kvcluster_<name>` with pointers to the arrays, which are contiguous."""
    assert all(array.is_contiguous() for array in arrays)
    pointers = [ctypes.c_void_p(array.data_ptr()) for array in arrays]
    getattr(library("recall"), f"kvcluster_{name}")((ctypes.c_int64 * len(shape))(*shape), *pointers)
