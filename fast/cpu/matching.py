"""Chunked soft matching and merging in C++."""

import ctypes
from collections.abc import Callable

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from ..exact.chunks import CompressedChunks
from .compiling import library, pointers
from .layout import DTYPES

__all__ = ["compress", "match", "merge_clusters"]


def compress(
    keys: Float[Tensor, "*lead tokens dim"],
    values: Float[Tensor, "*lead tokens dim_value"] | None,
    *,
    chunk_size: int,
    target: int,
) -> CompressedChunks:
    """As `kvcluster.fast.plain.soft_matching.compress`, keys and values of one dtype; nothing is widened as a whole."""
    labels, counts = room_for_clusters(keys, chunk_size, target)
    key_means = torch.empty(*counts.shape, keys.shape[-1], dtype=torch.float32, device="cpu")
    value_means = None if values is None else key_means.new_empty(*counts.shape, values.shape[-1])
    n_scored_rows = cluster(keys, values, labels, counts, key_means, value_means)
    n_rows = len(labels) * sources_of_rounds(chunk_size, target)
    return CompressedChunks(labels, counts, key_means, value_means, n_rows, n_scored_rows)


def match(keys: Float[Tensor, "*lead tokens dim"], *, chunk_size: int, target: int) -> tuple[Tensor, Tensor]:
    """As `kvcluster.fast.plain.soft_matching.match`."""
    labels, counts = room_for_clusters(keys, chunk_size, target)
    cluster(keys, None, labels, counts, None, None)
    return labels, counts


def room_for_clusters(keys: Tensor, chunk_size: int, target: int) -> tuple[Tensor, Tensor]:
    """Labels (chunks, chunk) and counts (chunks, target), to be filled."""
    chunks = keys.shape[:-2].numel() * (keys.shape[-2] // chunk_size)
    labels, counts = (torch.empty(chunks, n, dtype=torch.int64, device="cpu") for n in (chunk_size, target))
    return labels, counts


def cluster(
    keys: Tensor,
    values: Tensor | None,
    labels: Tensor,
    counts: Tensor,
    key_means: Tensor | None,
    value_means: Tensor | None,
) -> int:
    """Fill the last four, of which means may be None; how many rows needed canonical scores."""
    keys, values = beside(keys), None if values is None else beside(values)
    heads, chunk_size = keys.shape[:-2].numel(), labels.shape[-1]
    shape = heads, keys.shape[-2] // chunk_size, chunk_size, counts.shape[-1], torch.get_num_threads()
    return function("soft_matching", keys.dtype)(
        numbers(*shape),
        *(numbers(*layout(array)) for array in (keys, keys if values is None else values)),
        *pointers(keys, values, labels, counts, key_means, value_means),
    )


def merge_clusters(
    array: Float[Tensor, "*lead tokens dim"],
    labels: Int64[Tensor, "*lead tokens"],
    counts: Int64[Tensor, "*lead entries"],
) -> Float32[Tensor, "*lead entries dim"]:
    """As `kvcluster.fast.exact.mean.ordered_mean`."""
    array = beside(array)
    heads, entries = counts.shape[:-1].numel(), counts.shape[-1]
    means = torch.empty(*counts.shape, array.shape[-1], dtype=torch.float32, device="cpu")
    function("merge", array.dtype)(
        numbers(heads, 1, labels.shape[-1], entries, torch.get_num_threads()),
        numbers(*layout(array)),
        *pointers(array, labels.contiguous(), means),
    )
    return means


def sources_of_rounds(size: int, target: int) -> int:
    """How many entries of a chunk look for a destination, in all rounds together."""
    n_sources = 0
    while size > target:
        n_sources += (size + 1) // 2
        size -= min(size // 2, size - target)
    return n_sources


def beside(array: Tensor) -> Tensor:
    """`array`, copied where its features do not lie side by side."""
    return array if array.stride(-1) == 1 else array.contiguous()


def layout(array: Tensor) -> list[int]:
    """`Layout` of the C++ file: dim, the stride of tokens, and length and stride of each leading axis."""
    *axes, (_, token), (dim, _) = zip(array.shape, array.stride(), strict=True)
    return [dim, token, len(axes), *(number for axis in axes for number in axis)]


def numbers(*integers: int) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(integers))(*integers)


def function(name: str, dtype: torch.dtype) -> Callable[..., int]:
    """The one of the C++ file for this dtype."""
    found = getattr(library("matching"), f"kvcluster_{name}_{DTYPES[dtype]}")
    found.restype = ctypes.c_int64
    made: Callable[..., int] = found
    return made
