"""Matching and merging as PyTorch operators, so that `torch.compile` and `torch.export` can go around them.

`torch.ops.kvcluster.chunked_soft_matching` and `torch.ops.kvcluster.merge`. Their results' shapes follow from the
arguments' shapes alone, which is what the fake kernels say.
"""

import torch
from torch import Tensor

from .arguments import check_finite, with_four_axes
from .backends import choose_backend
from .chunk_compression import CompressedChunks, compress, count_members
from .exact_mean import ordered_mean

__all__ = ["chunked_soft_matching", "merge"]


@torch.library.custom_op("kvcluster::chunked_soft_matching", mutates_args=())
def chunked_soft_matching(keys: Tensor, target: int, chunk_size: int, backend: str) -> tuple[Tensor, Tensor]:
    """Labels (..., tokens) and counts (..., entries), int64."""
    check_finite("keys", keys)
    *lead, tokens, _ = keys.shape
    rest = tokens % chunk_size
    body = keys[..., : tokens - rest, :]
    made = compress(body, None, chunk_size=chunk_size, target=target, backend=backend)
    return clustering_of_chunks(made, lead, tokens - rest, rest)


@chunked_soft_matching.register_fake
def _(keys: Tensor, target: int, chunk_size: int, backend: str) -> tuple[Tensor, Tensor]:
    tokens = keys.shape[-2]
    entries = tokens // chunk_size * target + tokens % chunk_size
    return (
        keys.new_empty(keys.shape[:-1], dtype=torch.int64),
        keys.new_empty((*keys.shape[:-2], entries), dtype=torch.int64),
    )


@torch.library.custom_op("kvcluster::merge", mutates_args=())
def merge(array: Tensor, labels: Tensor, counts: Tensor, backend: str) -> Tensor:
    """Centroids (..., entries, dim), float32."""
    check_finite("array", array)
    check_clustering(labels, counts)
    if choose_backend(backend, array) == "torch":
        return ordered_mean(array, labels, counts)
    from .kernels.merge import merge as merge_by_kernel

    problems = array.shape[:-2].numel()
    means = merge_by_kernel(with_four_axes(array), *(x.reshape(problems, x.shape[-1]) for x in (labels, counts)))
    return means.reshape(*counts.shape, array.shape[-1])


@merge.register_fake
def _(array: Tensor, labels: Tensor, counts: Tensor, backend: str) -> Tensor:
    return array.new_empty((*counts.shape, array.shape[-1]), dtype=torch.float32)


def check_clustering(labels: Tensor, counts: Tensor) -> None:
    """Refuse counts that are not the numbers of the labels, and entries without tokens."""
    entries = counts.shape[-1]
    if labels.numel() and not bool(((labels >= 0) & (labels < entries)).all()):
        raise ValueError(f"labels must be from 0 to {entries - 1}, got {int(labels.min())} to {int(labels.max())}")
    problems = labels.shape[:-1].numel()
    members = count_members(labels.reshape(problems, labels.shape[-1]), entries)
    if not torch.equal(members, counts.reshape(problems, entries)):
        raise ValueError("counts must be the number of tokens of each label, got other numbers")
    if bool((counts < 1).any()):
        raise ValueError(f"counts must be at least 1, got {int(counts.min())}")


def clustering_of_chunks(made: CompressedChunks, lead: list[int], body: int, rest: int) -> tuple[Tensor, Tensor]:
    """Labels and counts of problems of shape `lead`: `body` tokens in whole chunks, then `rest` tokens as they are."""
    chunk_size, target = made.labels.shape[-1], made.counts.shape[-1]
    chunks = body // chunk_size  # of each problem
    first = torch.arange(chunks, device=made.labels.device)[:, None] * target  # first entry of each chunk
    labels = (made.labels.reshape(*lead, chunks, chunk_size) + first).reshape(*lead, body)
    counts = made.counts.reshape(*lead, chunks * target)
    tail = torch.arange(rest, device=labels.device).expand(*lead, rest)
    return torch.cat([labels, chunks * target + tail], dim=-1), torch.cat([counts, torch.ones_like(tail)], dim=-1)
