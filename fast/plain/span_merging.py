"""Merging two spans of entries into one: one round of soft matching, centroids weighted by their counts.

Defined by `kvcluster.reference.span_merging`; the same bits.
"""

import torch
from jaxtyping import Float, Float32, Int32
from torch import Tensor

from ..exact.chunks import count_members, renumber
from ..exact.mean import ordered_sum
from ..exact.similarity import certified_matches

__all__ = ["merge_entries"]


def merge_entries(
    keys: Float[Tensor, "*lead entries dim"],
    values: Float[Tensor, "*lead entries dim_value"],
    counts: Int32[Tensor, "*lead entries"],
) -> tuple[
    Float32[Tensor, "*lead half dim"], Float32[Tensor, "*lead half dim_value"], Int32[Tensor, "*lead half"], int
]:
    """Keys, values and counts after one round in which every source joins its best destination.

    The fourth result is how many sources needed canonical scores.
    """
    *lead, size = counts.shape
    keys, values, counts = (x.flatten(0, len(lead) - 1) for x in (keys, values, counts))  # (problems, entries, dim)
    matches = certified_matches(keys[:, 0::2].float(), keys[:, 1::2].float())
    labels = renumber(matches.destination, None, size, size // 2)  # (problems, entries)
    members, weights = count_members(labels, size // 2), counts.double().unsqueeze(-1)
    totals = torch.zeros_like(counts[:, : size // 2]).scatter_add_(-1, labels, counts)
    sums = (ordered_sum(array.double() * weights, labels, members) for array in (keys, values))
    new_keys, new_values = ((total / totals.unsqueeze(-1)).float().unflatten(0, lead) for total in sums)
    return new_keys, new_values, totals.unflatten(0, lead), int(matches.is_scored.sum())
