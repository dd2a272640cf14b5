"""Distinctive matching on torch tensors: the reference's decisions, to the bit."""

from dataclasses import dataclass
from functools import partial

from jaxtyping import Float
from torch import Tensor

from .arguments import check_append
from .backends import AnyBackend, cell, choose
from .exact.chunks import CompressedChunks, Heads, HeadsOfTarget, all_heads, cluster_chunks, of_heads
from .merging import Clustering
from .scalars import check_integer, check_keep_ratio, entries_of_chunk

__all__ = ["Distinctive", "distinctive_matching"]


@dataclass(frozen=True)
class Distinctive:
    """`distinctive_matching` as the method of a cache: as in `kvcluster.reference.Distinctive`."""

    n_shared: int = 4

    def __post_init__(self) -> None:
        object.__setattr__(self, "n_shared", check_integer("n_shared", self.n_shared, least=1))

    def compress(
        self,
        keys: Float[Tensor, "*lead tokens dim"],
        values: Float[Tensor, "*lead tokens dim_value"],
        *,
        chunk_size: int,
        target: int,
        backend: AnyBackend = "auto",
    ) -> CompressedChunks:
        """Whole chunks in `target` clusters, which are fewer than `chunk_size`."""
        [(_, compressed)] = self.compress_heads(
            keys, values, chunk_size=chunk_size, heads_of_target={target: all_heads(keys)}, backend=backend
        )
        return compressed

    def compress_heads(
        self,
        keys: Float[Tensor, "*lead tokens dim"],
        values: Float[Tensor, "*lead tokens dim_value"],
        *,
        chunk_size: int,
        heads_of_target: HeadsOfTarget,
        backend: AnyBackend = "auto",
    ) -> list[tuple[Heads, CompressedChunks]]:
        """As `methods.compress_heads`; all heads are scored once, together."""
        chosen = choose("distinctiveness", backend, keys, values)
        scores, compress = (
            cell("distinctiveness", chosen)(keys, values, chunk_size),
            cell("distinctive_matching", chosen),
        )
        return [
            (heads, compress(scores, *of_heads(heads, keys, values), target=target, n_shared=self.n_shared))
            for target, heads in heads_of_target.items()
        ]


def distinctive_matching(
    keys: Float[Tensor, "*lead tokens dim"],
    values: Float[Tensor, "*lead tokens dim_value"],
    *,
    keep_ratio: float,
    chunk_size: int = 256,
    n_shared: int = 4,
    backend: AnyBackend = "auto",
) -> Clustering:
    """Each chunk of `chunk_size` tokens in `ceil(keep_ratio * chunk_size)` clusters, most of them single tokens.

    Defined, with its errors, by `kvcluster.reference.distinctive_matching`; the same labels and counts, on the device
    of `keys`. `backend` as in `choose`.
    """
    check_append(keys, values, None)
    keep_ratio = check_keep_ratio(keep_ratio)
    chunk_size = check_integer("chunk_size", chunk_size, least=1)
    method = Distinctive(n_shared)
    choose("distinctiveness", backend, keys, values)  # also where there is nothing to do
    target = entries_of_chunk(keep_ratio, chunk_size)
    compress = partial(method.compress, backend=backend)
    return Clustering(*cluster_chunks(compress, keys, values, chunk_size=chunk_size, target=target))
