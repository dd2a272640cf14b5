"""The spans that a plan merges, carried out in place."""

import torch
from torch import Tensor

from ..backends import implementation
from .spans import SpanPlan

__all__ = ["merge_spans"]

WORKING_BYTES = 4 * 2**20  # of float64 numbers that are worked on together


def merge_spans(held: tuple[Tensor, ...], plan: SpanPlan, first: int, size: int) -> tuple[int, int]:
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
    merge_entries = implementation("merge_entries", "auto", *held)
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
