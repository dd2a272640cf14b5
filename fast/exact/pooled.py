"""Pooled matching in steps, whichever backend takes them: which entries look for others, and what becomes of them.

Defined by `kvcluster.reference.pooled_matching`. A problem is what competes for the merges, one head of one batch row.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32, Int32, Int64, Shaped
from torch import Tensor

__all__ = [
    "CompressedEntries",
    "compress_in_steps",
    "count_sources",
    "destination_entries",
    "in_one_row",
    "source_entries",
    "spans_with_matches",
]

WORKING_BYTES = 4 * 2**20  # of float64 numbers of the problems that are worked on together

# Keys, values and counts of some problems, n_merged and chunk_size; returns what is left after one step, and how many
# of its sources needed canonical scores.
Step = Callable[[Tensor, Tensor, Tensor, int, int], tuple[Tensor, Tensor, Tensor, int]]


@dataclass(frozen=True, eq=False)
class CompressedEntries:
    """What is left of the entries, and how much of the work the filter could not settle.

    Attributes
    ----------
    keys : (batch, heads, left, dim), float32.
    values : (batch, heads, left, dim_value), float32.
    counts : (batch, heads, left), int32.
    n_rows : sources matched, in all steps.
    n_scored_rows : of these, the ones that needed canonical scores, for their match or for their place at the cut.
    """

    keys: Float32[Tensor, "batch heads left dim"]
    values: Float32[Tensor, "batch heads left dim_value"]
    counts: Int32[Tensor, "batch heads left"]
    n_rows: int
    n_scored_rows: int


def compress_in_steps(
    take_step: Step,
    keys: Float[Tensor, "batch heads entries dim"],
    values: Float[Tensor, "batch heads entries dim_value"],
    counts: Int32[Tensor, "batch heads entries"],
    *,
    target: int,
    chunk_size: int,
) -> CompressedEntries:
    """Steps until at most `target` entries are left, of as many problems at once as fit the working memory.

    `take_step` gets keys and values of these in float32, contiguous.
    """
    lead, entries = counts.shape[:-1], counts.shape[-1]
    given = [array.flatten(0, 1) for array in (keys, values, counts)]
    problems, left, widest = len(given[0]), min(entries, target), max(chunk_size, keys.shape[-1], values.shape[-1])
    made = [torch.empty(problems, left, x.shape[-1], dtype=torch.float32, device=x.device) for x in given[:2]]
    made.append(torch.empty(problems, left, dtype=torch.int32, device=counts.device))
    together = max(1, WORKING_BYTES // max(1, entries * widest * torch.float64.itemsize))
    n_rows = n_scored_rows = 0
    for part in (slice(first, first + together) for first in range(0, problems, together)):
        *left_of, n_matched, n_scored = take_steps(
            take_step, given[0][part], given[1][part], given[2][part], target, chunk_size
        )
        for into, array in zip(made, left_of, strict=True):
            into[part] = array
        n_rows += n_matched
        n_scored_rows += n_scored
    new_keys, new_values, new_counts = (x.unflatten(0, lead) for x in made)
    return CompressedEntries(new_keys, new_values, new_counts, n_rows, n_scored_rows)


def take_steps(
    take_step: Step, keys: Tensor, values: Tensor, counts: Tensor, target: int, chunk_size: int
) -> tuple[Tensor, Tensor, Tensor, int, int]:
    """Keys, values and counts of these problems after all steps, `n_rows` and `n_scored_rows`."""
    keys, values, counts = keys.float().contiguous(), values.float().contiguous(), counts.int().contiguous()
    n_rows = n_scored_rows = 0
    while (size := counts.shape[1]) > target:
        n_merged = min(size // 2, size - target)
        keys, values, counts, n_scored = take_step(keys, values, counts, n_merged, chunk_size)
        n_rows += len(counts) * count_sources(size, chunk_size)
        n_scored_rows += n_scored
    return keys, values, counts, n_rows, n_scored_rows


def source_entries(size: int, chunk_size: int, device: torch.device | None = None) -> Int64[Tensor, " sources"]:
    """Which of `size` entries look for a destination: 0, 2, ... of each chunk, but not an entry alone in the last."""
    entries = torch.arange(size - (size % chunk_size == 1), device=device)
    return entries[entries % chunk_size % 2 == 0]


def spans_with_matches(size: int, chunk_size: int) -> list[tuple[int, int, int]]:
    """First entry, end and size of a chunk, of the whole chunks of `size` entries and of a shorter one after them."""
    whole = size - size % chunk_size
    return [span for span in ((0, whole, chunk_size), (whole, size, size - whole)) if span[1] - span[0] > 1]


def count_sources(size: int, chunk_size: int) -> int:
    """How many there are."""
    return sum(
        (end - first) // chunk * ((chunk + 1) // 2) for first, end, chunk in spans_with_matches(size, chunk_size)
    )


def in_one_row(found: Shaped[Tensor, "all_chunks sources"], problems: int) -> Shaped[Tensor, "problems all_sources"]:
    """What was found for the sources of each chunk, for all chunks of a problem."""
    chunks = len(found) // max(1, problems)
    return found.reshape(problems, chunks * found.shape[1])


def destination_entries(
    destination: Int64[Tensor, "all_chunks sources"], problems: int, first: int, chunk_size: int
) -> Int64[Tensor, "problems all_sources"]:
    """Entries that the sources found in chunks which begin at entry `first` of each problem, `in_one_row`."""
    found = in_one_row(destination, problems)
    chunk = torch.arange(found.shape[1], device=found.device) // destination.shape[1]
    return first + chunk * chunk_size + 2 * found + 1
