"""Pooled matching of all heads by kernels: a few launches a step; the host waits once, at the end."""

import torch
from torch import Tensor

from ..exact.chunks import count_members, join
from ..exact.pooled import CompressedEntries, destination_entries, in_one_row, source_entries, spans_with_matches
from .match import match
from .merge import merge
from .score import score

__all__ = ["compress_entries"]


def compress_entries(
    keys: Tensor, values: Tensor, counts: Tensor, *, target: int, chunk_size: int
) -> CompressedEntries:
    """As `kvcluster.fast.plain.pooled_matching.compress_entries`."""
    lead = counts.shape[:-1]
    n_scored = torch.zeros((), dtype=torch.int64, device=keys.device)
    n_rows = 0
    while (size := counts.shape[-1]) > target:
        n_merged = min(size // 2, size - target)
        labels, is_scored = pooled_round(keys, n_merged, chunk_size)
        members, weights = count_members(labels, size - n_merged), counts.flatten(0, 1)
        keys, values = (merge(array, labels, members, weights).unflatten(0, lead) for array in (keys, values))
        counts = torch.zeros_like(members, dtype=torch.int32).scatter_add_(-1, labels, weights).unflatten(0, lead)
        n_rows += is_scored.numel()
        n_scored += is_scored.sum()
    return CompressedEntries(keys.float(), values.float(), counts, n_rows, int(n_scored))


def pooled_round(keys: Tensor, n_merged: int, chunk_size: int) -> tuple[Tensor, Tensor]:
    """New entry of each old entry (problems, size), and which sources (problems, sources) needed canonical scores."""
    problems, size = keys.shape[:2].numel(), keys.shape[2]
    sources = source_entries(size, chunk_size, keys.device).expand(problems, -1)
    is_choosy = n_merged < sources.shape[1]
    found, scored, similar = [], [], []
    for first, end, chunk in spans_with_matches(size, chunk_size):
        span = keys[:, :, first:end]
        destination, is_scored = match(span, chunk)
        if is_choosy:
            similar.append(in_one_row(score(span, chunk, destination), problems))
        found.append(destination_entries(destination, problems, first, chunk))
        scored.append(in_one_row(is_scored, problems))
    destinations = torch.cat(found, dim=1)
    if is_choosy:
        merged = torch.cat(similar, dim=1).neg().argsort(dim=-1, stable=True)[:, :n_merged]  # of ties, the first
        sources, destinations = sources.gather(-1, merged), destinations.gather(-1, merged)
    return join(size, sources, destinations), torch.cat(scored, dim=1)
