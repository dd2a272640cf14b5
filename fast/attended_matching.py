"""Attended matching on torch tensors: the reference's decisions, to the bit."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from .arguments import check_append
from .backends import AnyBackend, cell, choose
from .exact.chunks import CompressedChunks, Heads, HeadsOfTarget, all_heads, cluster_chunks, of_heads
from .exact.distinctiveness import numbers_of_entries
from .merging import Clustering
from .recent_queries import check_chunk_queries
from .scalars import check_integer, check_keep_ratio, check_share, entries_of_chunk

__all__ = ["Attended", "attended_matching"]


@dataclass(frozen=True)
class Attended:
    """`attended_matching` as the method of a cache: as in `kvcluster.reference.Attended`."""

    share: float = 0.5
    n_shared: int = 4
    needs_queries: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "share", check_share("share", self.share))
        object.__setattr__(self, "n_shared", check_integer("n_shared", self.n_shared, least=1))

    def compress(
        self,
        keys: Float[Tensor, "*lead tokens dim"],
        values: Float[Tensor, "*lead tokens dim_value"],
        *,
        queries: Float[Tensor, "*lead chunks queries dim"],
        chunk_size: int,
        target: int,
        backend: AnyBackend = "auto",
    ) -> CompressedChunks:
        """Whole chunks in `target` clusters, which are fewer than `chunk_size`."""
        heads_of_target = {target: all_heads(keys)}
        how: Any = {"chunk_size": chunk_size, "backend": backend}
        [(_, compressed)] = self.compress_heads(keys, values, queries=queries, heads_of_target=heads_of_target, **how)
        return compressed

    def compress_heads(
        self,
        keys: Float[Tensor, "*lead tokens dim"],
        values: Float[Tensor, "*lead tokens dim_value"],
        *,
        queries: Float[Tensor, "*lead chunks queries dim"],
        chunk_size: int,
        heads_of_target: HeadsOfTarget,
        backend: AnyBackend = "auto",
    ) -> list[tuple[Heads, CompressedChunks]]:
        """As `methods.compress_heads`; all heads are scored once, together."""
        chosen = choose("distinctiveness", backend, keys, values)
        distinctive = cell("distinctiveness", chosen)(keys, values, chunk_size)  # (layers, chunks, chunk)
        compress = cell("distinctive_matching", chosen)
        compressed = []
        for target, heads in heads_of_target.items():
            in_heads = of_heads(heads, keys, values, queries.flatten(-3, -2))
            some_keys, some_values = in_heads[:2]
            n_attended = math.floor(self.share * numbers_of_entries(target, self.n_shared)[0])
            scores = distinctive.unsqueeze(1).expand(-1, len(heads), -1, -1)  # (layers, heads, chunks, chunk)
            if n_attended:
                in_chunks = some_keys.reshape(-1, chunk_size, keys.shape[-1])
                of_chunks = in_heads[2].reshape(-1, *queries.shape[-2:])
                margins = cell("attention_margins", chosen)(in_chunks, of_chunks).view(scores.shape)
                scores = with_attended_first(scores, margins, n_attended)
            each_alone = (x.reshape(-1, 1, *x.shape[-2:]) for x in (some_keys, some_values))  # a layer of one head
            rules = {"target": target, "n_shared": self.n_shared}
            compressed.append((heads, compress(scores.flatten(0, 1), *each_alone, **rules)))
        return compressed


def with_attended_first(
    scores: Float64[Tensor, "layers heads chunks chunk"],
    margins: Float64[Tensor, "layers heads chunks chunk"],
    n_attended: int,
) -> Float64[Tensor, "layers heads chunks chunk"]:
    """The scores, those of the `n_attended` tokens of the largest margins, of ties the first, above all others."""
    attended = margins.argsort(dim=-1, descending=True, stable=True)[..., :n_attended]
    return scores.scatter(-1, attended, torch.inf)


def attended_matching(
    keys: Float[Tensor, "*lead tokens dim"],
    values: Float[Tensor, "*lead tokens dim_value"],
    queries: Float[Tensor, "*lead chunks queries dim"],
    *,
    keep_ratio: float,
    chunk_size: int = 256,
    share: float = 0.5,
    n_shared: int = 4,
    backend: AnyBackend = "auto",
) -> Clustering:
    """Each chunk of `chunk_size` tokens in `ceil(keep_ratio * chunk_size)` clusters, most of them single tokens.

    Defined, with its errors, by `kvcluster.reference.attended_matching`; the same labels and counts, on the device of
    `keys`. `backend` as in `choose`.
    """
    check_append(keys, values, None)
    keep_ratio = check_keep_ratio(keep_ratio)
    chunk_size = check_integer("chunk_size", chunk_size, least=1)
    method = Attended(share, n_shared)
    check_chunk_queries(queries, keys, chunk_size)
    choose("distinctiveness", backend, keys, values)  # also where there is nothing to do
    target = entries_of_chunk(keep_ratio, chunk_size)
    compress = partial(method.compress, queries=queries.detach(), backend=backend)
    return Clustering(*cluster_chunks(compress, keys, values, chunk_size=chunk_size, target=target))
