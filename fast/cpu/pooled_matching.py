"""Pooled matching in C++: every similarity canonical, so there is no filter."""

import ctypes

import torch
from jaxtyping import Float, Int32
from torch import Tensor

from ..exact.pooled import CompressedEntries, compress_in_steps, count_sources
from .compiling import library, pointers

__all__ = ["compress_entries"]


def compress_entries(
    keys: Float[Tensor, "batch heads entries dim"],
    values: Float[Tensor, "batch heads entries dim_value"],
    counts: Int32[Tensor, "batch heads entries"],
    *,
    target: int,
    chunk_size: int,
) -> CompressedEntries:
    """As `kvcluster.fast.plain.pooled_matching.compress_entries`; dim must be a multiple of LANES."""
    return compress_in_steps(take_step, keys, values, counts, target=target, chunk_size=chunk_size)


def take_step(
    keys: Tensor, values: Tensor, counts: Tensor, n_merged: int, chunk_size: int
) -> tuple[Tensor, Tensor, Tensor, int]:
    """As `kvcluster.fast.exact.pooled.Step`."""
    problems, size, dim = keys.shape
    n_left, dim_value = size - n_merged, values.shape[-1]
    made = keys.new_empty(problems, n_left, dim), values.new_empty(problems, n_left, dim_value)
    new_counts = counts.new_empty(problems, n_left)
    shape = (problems, size, dim, dim_value, chunk_size, n_merged, torch.get_num_threads())
    arrays = pointers(keys, values, counts, *made, new_counts)
    library("pooled").kvcluster_pooled_step((ctypes.c_int64 * len(shape))(*shape), *arrays)
    return *made, new_counts, problems * count_sources(size, chunk_size)
