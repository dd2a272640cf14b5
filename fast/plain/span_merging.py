"""Merging two spans of entries into one: one round of soft matching, centroids weighted by their counts.

Defined by `kvcluster.reference.span_merging`; the same bits.
"""

from jaxtyping import Float, Float32, Int32
from torch import Tensor

from ..exact.chunks import renumber
from ..exact.mean import merge_stored
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
    merged = (x.unflatten(0, lead) for x in merge_stored(keys, values, counts, labels, size // 2))
    new_keys, new_values, new_counts = merged
    return new_keys, new_values, new_counts, int(matches.is_scored.sum())
