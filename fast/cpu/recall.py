"""A decoding step of the recall cache in C++."""

import torch
from torch import Tensor

from ..exact.entries import Reached, Rest, places_of
from ..exact.scores import ScoredClusters
from .attention import attend_places
from .compiling import call
from .layout import DTYPES

__all__ = ["attend_recalled", "take"]


def take(probe: Tensor, clusters: ScoredClusters, counts: Tensor, budget: int) -> Tensor:
    """Tokens taken of each cluster (problems, clusters), int64.

    Parameters
    ----------
    probe : (problems, group, 2 * dim), float32: queries, then how far they reach.
    clusters : their features in bfloat16.
    counts : (problems, clusters), int64.
    """
    problems, group, dims = probe.shape
    taken = torch.empty_like(counts)
    shape = (problems, group, dims // 2, counts.shape[1], budget, torch.get_num_threads())
    call("recall", "take", shape, probe, clusters.features, clusters.mean, clusters.largest, counts, taken)
    return taken


def attend_recalled(
    query: Tensor, reached: Reached, taken: Tensor | None, n_recalled: int, rest: Rest | None, scale: float
) -> Tensor:
    """As `kvcluster.fast.plain.attention.attend_recalled`; without `rest` rows are read where they lie.

    Memory of `reached` is contiguous then: `n_sink` sinks, `n_body` tokens in cluster order, recent tokens.
    """
    keys, values, first_row, n_sink, n_body, n_exact = reached
    if taken is None or first_row is None or rest is not None:
        return attend_places(query, keys, values, places_of(reached, taken, n_recalled), rest, scale)
    problems, group, dim = query.shape
    scaled = (query.float() * scale).contiguous()
    output = torch.empty_like(scaled)
    shape = (problems, group, dim, keys.shape[1], n_sink, n_exact, n_body, taken.shape[1], torch.get_num_threads())
    call("recall", f"attend_body_{DTYPES[keys.dtype]}", shape, scaled, keys, values, first_row, taken, output)
    return output.to(query.dtype)
