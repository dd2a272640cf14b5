"""What a page of vLLM's pool holds: keys, values and counts of the tokens or centroids of one layer.

Keys lie feature by feature and values token by token, as vLLM's CPU kernels want them; the counts, for which the spec
asks four bytes more an entry, come after both.
"""

import torch
from jaxtyping import Float, Int32, Int64
from torch import Tensor

from .rule import PageRule

__all__ = ["COUNT_BYTES", "cells_of", "cluster_chunks", "counts_of", "keys_of", "values_of", "without_counts"]

COUNT_BYTES = 4


def cells_of(kv_cache: Float[Tensor, "blocks heads page content"]) -> Float[Tensor, "blocks heads cell"]:
    """Pages of each KV head as vLLM allocated them, contents not told apart: a view."""
    blocks, heads, page, content = kv_cache.shape
    return kv_cache.as_strided((blocks, heads, page * content), (kv_cache.stride(0), kv_cache.stride(1), 1))


def without_counts(
    kv_cache: Float[Tensor, "blocks heads page content"], dim: int
) -> Float[Tensor, "blocks heads page content_of_stock"]:
    """The pages as vLLM's kernels know them, keys and values, without the counts: a view."""
    page = kv_cache.shape[2]
    return cells_of(kv_cache)[..., : 2 * page * dim].unflatten(-1, (page, 2 * dim))


def keys_of(cells: Tensor, page: int, dim: int) -> Float[Tensor, "blocks heads dim page"]:
    """Keys: a view."""
    return cells[..., : page * dim].unflatten(-1, (dim, page))


def values_of(cells: Tensor, page: int, dim: int) -> Float[Tensor, "blocks heads page dim"]:
    """Values: a view."""
    return cells[..., page * dim : 2 * page * dim].unflatten(-1, (page, dim))


def counts_of(cells: Tensor, page: int, dim: int) -> Int32[Tensor, "blocks heads page"]:
    """Counts: a view. They are written when a chunk is clustered; in pages of tokens they mean nothing."""
    return cells[..., 2 * page * dim :].view(torch.int32)


def cluster_chunks(
    source: Tensor,
    blocks: Int64[Tensor, "chunks pages"],
    cells: Tensor,
    to: Int64[Tensor, "chunks entry_pages"],
    rule: PageRule,
    dim: int,
) -> None:
    """Cluster the chunks that lie in `blocks` of the cells `source`, and write their entries to the pages `to`.

    The entries have the bits of the chunk's entries in a `ClusteredCache` of the same parameters.
    """
    page, n_pages = rule.page, rule.entries // rule.page
    keys = keys_of(source, page, dim)[blocks]  # (chunks, pages, heads, dim, page)
    values = values_of(source, page, dim)[blocks]  # (chunks, pages, heads, page, dim)
    keys = keys.permute(0, 2, 1, 4, 3).flatten(2, 3)  # (chunks, heads, chunk, dim)
    values = values.permute(0, 2, 1, 3, 4).flatten(2, 3)
    compressed = rule.method.compress(keys, values, chunk_size=rule.chunk_size, target=rule.entries)
    assert compressed.values is not None  # values were given
    chunks, heads = keys.shape[:2]
    entries = compressed.keys, compressed.values, compressed.counts
    in_pages = [x.reshape(chunks, heads, n_pages, page, -1) for x in entries]
    keys_of(cells, page, dim)[to] = in_pages[0].permute(0, 2, 1, 4, 3).to(cells.dtype)
    values_of(cells, page, dim)[to] = in_pages[1].permute(0, 2, 1, 3, 4).to(cells.dtype)
    counts_of(cells, page, dim)[to] = in_pages[2].squeeze(-1).transpose(1, 2).int()
