"""Chunked soft matching on torch tensors: the reference's decisions, certified."""

from jaxtyping import Float
from torch import Tensor

from . import operators
from .arguments import check_integer, check_keep_ratio, check_shape, entries_of_chunk
from .backends import Backend, choose_backend
from .merging import Clustering

__all__ = ["chunked_soft_matching"]


def chunked_soft_matching(
    keys: Float[Tensor, "*lead tokens dim"], *, keep_ratio: float, chunk_size: int = 64, backend: Backend = "auto"
) -> Clustering:
    """Each chunk of `chunk_size` tokens in `ceil(keep_ratio * chunk_size)` clusters.

    Defined, with its errors, by `kvcluster.reference.chunked_soft_matching`; the same labels and counts, on the
    device of `keys`. `backend` as in `choose_backend`.
    """
    check_shape("keys", keys)
    check_keep_ratio(keep_ratio)
    check_integer("chunk_size", chunk_size, least=1)
    choose_backend(backend, keys)
    target = entries_of_chunk(keep_ratio, chunk_size)
    return Clustering(*operators.chunked_soft_matching(keys, target, chunk_size, backend))
