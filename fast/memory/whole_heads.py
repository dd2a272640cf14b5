"""KV heads that keep every token, apart from those that are clustered. Defined by `kvcluster.reference.whole_heads`."""

import torch
from jaxtyping import Float, Int32
from torch import Tensor

__all__ = ["apart", "heads_apart", "in_order", "together"]


def heads_apart(heads: int, whole_heads: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Indices of the heads that are clustered, and of those that stay whole."""
    others = [head for head in range(heads) if head not in whole_heads]
    return torch.tensor(others, dtype=torch.int64, device=device), torch.tensor(whole_heads, device=device)


def apart(array: Float[Tensor, "*lead tokens dim"], whole_heads: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The heads that are clustered, and those that stay whole, of (..., heads, tokens, dim)."""
    others, whole = heads_apart(array.shape[-3], whole_heads, array.device)
    return array.index_select(-3, others), array.index_select(-3, whole)


def in_order(clustered: Tensor, whole: Tensor, whole_heads: tuple[int, ...], axis: int) -> Tensor:
    """All heads in their order along `axis`."""
    joined = torch.cat([clustered, whole], dim=axis)
    order = torch.cat(heads_apart(joined.shape[axis], whole_heads, joined.device))
    return joined.index_select(axis, order.argsort())


def together(
    keys: Float[Tensor, "*lead others entries dim"],
    values: Float[Tensor, "*lead others entries dim_value"],
    counts: Int32[Tensor, "*lead others entries"],
    whole_keys: Float[Tensor, "*lead whole tokens dim"],
    whole_values: Float[Tensor, "*lead whole tokens dim_value"],
    whole_heads: tuple[int, ...],
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values and counts of all heads in their order; entries come last, after zeros of count 0."""
    n_missing = whole_keys.shape[-2] - counts.shape[-1]
    pad = torch.nn.functional.pad
    ones = counts.new_ones(whole_keys.shape[:-1])
    return (
        in_order(pad(keys, (0, 0, n_missing, 0)), whole_keys, whole_heads, -3),
        in_order(pad(values, (0, 0, n_missing, 0)), whole_values, whole_heads, -3),
        in_order(pad(counts, (n_missing, 0)), ones, whole_heads, -2),
    )
