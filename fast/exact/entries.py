"""Entries of a cache that are attended to: where they lie, how they are gathered, what their counts add."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Float32, Int32, Int64
from torch import Tensor

__all__ = ["Reached", "Rest", "attend_copies", "entries_at", "log_counts", "places_of", "recalled_places", "rows_of"]

# Centroids of keys and of values, and how many tokens each stands for.
Rest = tuple[
    Float32[Tensor, "problems clusters dim"],
    Float32[Tensor, "problems clusters dim_value"],
    Int32[Tensor, "problems clusters"],
]


class Reached(NamedTuple):
    """Memory in which a step of a recall cache finds its tokens: sinks, then body, then recent tokens.

    Attributes
    ----------
    keys, values : (problems, rows, .).
    first_row : (problems, clusters), int64: where each cluster begins, counted from behind the sinks; None while there
        is no body.
    n_sink, n_body : rows of sinks and of the body.
    n_exact : tokens that are always attended to, sinks and recent ones.
    """

    keys: Tensor
    values: Tensor
    first_row: Tensor | None
    n_sink: int
    n_body: int
    n_exact: int


def log_counts(counts: Tensor) -> Tensor:
    """Natural logarithm of the counts in float32, minus infinity where a count is 0."""
    return counts.double().log().float()


def rows_of(array: Float[Tensor, "problems rows dim"], places: Int64[Tensor, "problems chosen"]) -> Tensor:
    """The chosen rows, (problems, chosen, dim): one copy of each."""
    flat = array.reshape(-1, array.shape[-1])
    index = places + torch.arange(len(array), device=places.device)[:, None] * array.shape[1]
    return flat.index_select(0, index.flatten()).view(*places.shape, array.shape[-1])


def entries_at(keys: Tensor, values: Tensor, places: Tensor, rest: Rest | None) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values and counts of the tokens `places`, count 0 where that is -1; then those that stand for the rest."""
    keys, values = (rows_of(array, places.clamp(min=0)) for array in (keys, values))
    counts = (places >= 0).int()
    if rest is None:
        return keys, values, counts
    pairs = zip((keys.float(), values.float(), counts), rest, strict=True)
    keys, values, counts = (torch.cat(pair, dim=1) for pair in pairs)
    return keys, values, counts


def attend_copies(
    attend: Callable[..., Tensor],
    query: Float[Tensor, "problems rows dim"],
    keys: Float[Tensor, "problems tokens dim"],
    values: Float[Tensor, "problems tokens dim_value"],
    places: Int64[Tensor, "problems entries"],
    rest: Rest | None,
    scale: float,
) -> Float[Tensor, "problems rows dim_value"]:
    """Attention by `attend` to copies of `entries_at(keys, values, places, rest)`."""
    arrays = (query, *entries_at(keys, values, places, rest))
    return attend(*(array.unsqueeze(0) for array in arrays), queries=1, scale=scale)[0]


def recalled_places(
    first_member: Int64[Tensor, "problems clusters"],
    taken: Int64[Tensor, "problems clusters"],
    n_recalled: int | None = None,
) -> Int64[Tensor, "problems recalled"]:
    """Where recalled tokens are in `members`: `n_recalled` of each problem if that is known, else filled with -1."""
    device = taken.device
    shift = (first_member - (taken.cumsum(dim=-1) - taken)).flatten()  # from place in the list to place in `members`
    if n_recalled is not None:
        shift = shift.repeat_interleave(taken.flatten(), output_size=len(taken) * n_recalled)
        return shift.reshape(len(taken), n_recalled) + torch.arange(n_recalled, device=device)
    totals = taken.sum(dim=-1, keepdim=True)
    is_there = torch.arange(int(totals.max()) if len(totals) else 0, device=device) < totals
    places = torch.full(is_there.shape, -1, device=device)
    places[is_there] = shift.repeat_interleave(taken.flatten()) + is_there.nonzero(as_tuple=True)[1]
    return places


def places_of(
    reached: Reached, taken: Int64[Tensor, "problems clusters"] | None, n_recalled: int
) -> Int64[Tensor, "problems entries"]:
    """Rows of `reached` that are attended to: sinks, recent tokens, the `n_recalled` tokens `taken` of the clusters."""
    exact = torch.arange(reached.n_exact, device=reached.keys.device)
    if taken is None or reached.first_row is None:
        return exact.expand(len(reached.keys), -1)
    exact = torch.where(exact < reached.n_sink, exact, exact + reached.n_body)
    recalled = recalled_places(reached.n_sink + reached.first_row, taken, n_recalled)
    return torch.cat([exact.expand(len(taken), -1), recalled], dim=1)
