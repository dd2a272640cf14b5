"""Chunked soft matching on torch tensors: the reference's decisions, certified."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from .arguments import check_finite, check_shape
from .backends import AnyBackend, choose, implementation
from .exact.chunks import CompressedChunks, Heads, HeadsOfTarget, numbered_through, of_heads
from .merging import Clustering
from .scalars import check_integer, check_keep_ratio, entries_of_chunk

__all__ = ["SoftMatching", "chunked_soft_matching"]


@dataclass(frozen=True)
class SoftMatching:
    """`chunked_soft_matching` as the method of a cache: as in `kvcluster.reference.SoftMatching`."""

    def compress(
        self,
        keys: Float[Tensor, "*lead tokens dim"],
        values: Float[Tensor, "*lead tokens dim_value"] | None,
        *,
        chunk_size: int,
        target: int,
        backend: AnyBackend = "auto",
    ) -> CompressedChunks:
        """Whole chunks in `target` clusters, which are fewer than `chunk_size`."""
        compress = implementation("soft_matching", backend, keys, *([] if values is None else [values]))
        compressed: CompressedChunks = compress(keys, values, chunk_size=chunk_size, target=target)
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
        """As `methods.compress_heads`: each head alone decides."""
        compressed = []
        for target, heads in heads_of_target.items():
            key, value = of_heads(heads, keys, values)
            chunks = self.compress(key, value, chunk_size=chunk_size, target=target, backend=backend)
            compressed.append((heads, chunks))
        return compressed


def chunked_soft_matching(
    keys: Float[Tensor, "*lead tokens dim"], *, keep_ratio: float, chunk_size: int = 256, backend: AnyBackend = "auto"
) -> Clustering:
    """Each chunk of `chunk_size` tokens in `ceil(keep_ratio * chunk_size)` clusters.

    Defined, with its errors, by `kvcluster.reference.chunked_soft_matching`; the same labels and counts, on the
    device of `keys`. `backend` as in `choose`.
    """
    keep_ratio = check_keep_ratio(keep_ratio)
    chunk_size = check_integer("chunk_size", chunk_size, least=1)
    check_shape("keys", keys)
    if not torch.compiler.is_compiling():  # the operator chooses again, and is not traced
        choose("soft_matching_alone", backend, keys)
    target = entries_of_chunk(keep_ratio, chunk_size)
    return Clustering(*match_chunks(keys, target, chunk_size, backend))


@torch.library.custom_op("kvcluster::chunked_soft_matching", mutates_args=())
def match_chunks(keys: Tensor, target: int, chunk_size: int, backend: str) -> tuple[Tensor, Tensor]:
    """Labels (..., tokens) and counts (..., entries), int64: an operator that `torch.compile` goes around."""
    check_finite("keys", keys)
    *lead, tokens, _ = keys.shape
    if tokens < chunk_size:
        labels = torch.arange(tokens, device=keys.device).expand(*lead, tokens).contiguous()
        return labels, torch.ones_like(labels)
    n_trailing = tokens % chunk_size
    body = keys[..., : tokens - n_trailing, :]
    match = implementation("soft_matching_alone", backend, keys)
    labels, counts = match(body, chunk_size=chunk_size, target=target)
    return numbered_through(labels, counts, lead, tokens - n_trailing, n_trailing)


@match_chunks.register_fake
def _(keys: Tensor, target: int, chunk_size: int, backend: str) -> tuple[Tensor, Tensor]:
    """Shapes, which follow from the arguments' shapes alone."""
    tokens = keys.shape[-2]
    entries = tokens // chunk_size * target + tokens % chunk_size
    return (
        keys.new_empty(keys.shape[:-1], dtype=torch.int64),
        keys.new_empty((*keys.shape[:-2], entries), dtype=torch.int64),
    )
