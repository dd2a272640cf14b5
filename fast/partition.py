"""The alternating partition on torch tensors."""

from jaxtyping import Int64
from torch import Tensor

from .exact.chunks import alternating_halves
from .scalars import check_integer

__all__ = ["alternating_partition"]


def alternating_partition(size: int) -> tuple[Int64[Tensor, " sources"], Int64[Tensor, " destinations"]]:
    """Entries 0, 2, ... as sources and 1, 3, ... as destinations (`kvcluster.reference.alternating_partition`)."""
    size = check_integer("size", size, least=0)
    return alternating_halves(size)
