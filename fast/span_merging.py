"""Merging two spans of entries into one: one round of soft matching, centroids weighted by their counts.

Defined by `kvcluster.reference.span_merging`; the same bits. Plain torch on every device, without a kernel of its own.
"""

import torch
from jaxtyping import Float, Float32, Int32
from torch import Tensor

from .chunk_compression import WORKING_BYTES, count_members, renumber
from .exact_mean import ordered_sum
from .exact_similarity import certified_matches
from .spans import SpanPlan

__all__ = ["merge_entries", "merge_spans"]


def merge_spans(held: tuple[Tensor, Tensor, Tensor], plan: SpanPlan, first: int, size: int) -> tuple[int, int]:
    """Carry out `plan` in place and close the gaps, on the spans of `size` entries that begin at entry `first`.

    Parameters
    ----------
    held : keys, values and counts, (..., entries, dim), (..., entries, dim_value) and (..., entries, 1).

    Returns
    -------
    How many sources were matched, and how many of them needed canonical scores.
    """
    body = slice(first, first + plan.n_slots * size)
    slots = [x[..., body, :].unflatten(-2, (plan.n_slots, size)) for x in held]  # (..., slots, entries, dim)
    problems, widest = held[0].shape[:-2].numel(), max(2 * size, *(x.shape[-1] for x in held))
    together = max(1, WORKING_BYTES // (max(1, problems) * 2 * size * widest * torch.float64.itemsize))
    n_rows = n_scored_rows = 0
    for older, younger in plan.rounds:
        for part in (slice(pair, pair + together) for pair in range(0, len(older), together)):
            pairs = [torch.cat([x[..., older[part], :, :], x[..., younger[part], :, :]], dim=-2) for x in slots]
            keys, values, counts, n_scored = merge_entries(pairs[0], pairs[1], pairs[2].squeeze(-1))
            for slot, merged in zip(slots, (keys, values, counts.unsqueeze(-1)), strict=True):
                slot[..., older[part], :, :] = merged.to(slot.dtype)
            n_rows += counts.numel()
            n_scored_rows += n_scored
    for slot in slots:
        slot[..., : len(plan.slots), :, :] = slot[..., plan.slots, :, :]  # a copy: places may overlap
    return n_rows, n_scored_rows


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
