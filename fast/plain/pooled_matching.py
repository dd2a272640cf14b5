"""Pooled matching of all chunks of a head at once: certified matches, pooled, then weighted means."""

import torch
from jaxtyping import Float, Float32, Int32, Int64
from torch import Tensor

from ..exact.chunks import join
from ..exact.mean import merge_stored
from ..exact.pooled import (
    CompressedEntries,
    compress_in_steps,
    destination_entries,
    in_one_row,
    source_entries,
    spans_with_matches,
)
from ..exact.similarity import Matches, certified_matches, certified_top

__all__ = ["compress_entries"]

WORKING_BYTES = 4 * 2**20  # of float64 numbers of the chunks that are matched together


def compress_entries(
    keys: Float[Tensor, "batch heads entries dim"],
    values: Float[Tensor, "batch heads entries dim_value"],
    counts: Int32[Tensor, "batch heads entries"],
    *,
    target: int,
    chunk_size: int,
) -> CompressedEntries:
    """Every head in `target` entries, or in as many as it has, if these are fewer.

    The bits are those of `compress_entries` of the reference.

    Parameters
    ----------
    keys, values, counts : entries as they are stored, any strides; float16, bfloat16 or float32, finite; counts from 1
        to 2**29.
    target : at least 1.
    chunk_size : entries of a chunk, at least 2.
    """
    return compress_in_steps(take_step, keys, values, counts, target=target, chunk_size=chunk_size)


def take_step(
    keys: Tensor, values: Tensor, counts: Tensor, n_merged: int, chunk_size: int
) -> tuple[Tensor, Tensor, Tensor, int]:
    """As `kvcluster.fast.exact.pooled.Step`."""
    labels, n_scored = pooled_round(keys, n_merged, chunk_size)
    return *merge_stored(keys, values, counts, labels, keys.shape[1] - n_merged), n_scored


def pooled_round(
    keys: Float32[Tensor, "problems size dim"], n_merged: int, chunk_size: int
) -> tuple[Int64[Tensor, "problems size"], int]:
    """New entry of each old entry after the `n_merged` best matches of all chunks have merged, and `n_scored`."""
    size = keys.shape[1]
    parts = [
        match_chunks(keys[:, first:end], first, chunk) for first, end, chunk in spans_with_matches(size, chunk_size)
    ]
    matches = side_by_side(parts)
    sources = source_entries(size, chunk_size, keys.device)
    merged = certified_top(matches, keys[:, sources], keys, n_merged)  # (problems, n_merged)
    labels = join(size, sources[merged], matches.destination.gather(-1, merged))
    return labels, int(matches.is_scored.sum())


def match_chunks(keys: Float32[Tensor, "problems span dim"], first: int, size: int) -> Matches:
    """Matches of the chunks of `size` entries that begin at entry `first`, the sources of a problem in one row.

    `destination` is an entry of the problem; a problem is unsafe if one of its chunks is.
    """
    problems = len(keys)
    chunks = keys.unflatten(1, (-1, size)).flatten(0, 1)  # (chunks of all problems, size, dim)
    together = max(1, WORKING_BYTES // (size * max(keys.shape[-1], size) * torch.float64.itemsize))
    found = [certified_matches(part[:, 0::2], part[:, 1::2]) for part in chunks.split(together)]
    return Matches(
        destination=destination_entries(torch.cat([part.destination for part in found]), problems, first, size),
        cosine=in_one_row(torch.cat([part.cosine for part in found]), problems),
        is_unsafe=in_one_row(torch.cat([part.is_unsafe for part in found])[:, None], problems).any(dim=1),
        is_scored=in_one_row(torch.cat([part.is_scored for part in found]), problems),
        similarity=in_one_row(torch.cat([part.similarity for part in found]), problems),
    )


def side_by_side(parts: list[Matches]) -> Matches:
    """Matches of one after the other, for the same problems."""
    return Matches(
        destination=torch.cat([part.destination for part in parts], dim=1),
        cosine=torch.cat([part.cosine for part in parts], dim=1),
        is_unsafe=torch.stack([part.is_unsafe for part in parts]).any(dim=0),
        is_scored=torch.cat([part.is_scored for part in parts], dim=1),
        similarity=torch.cat([part.similarity for part in parts], dim=1),
    )
