"""Attention to pages in C++."""

import ctypes

import torch
from jaxtyping import Float, Int32, Int64
from torch import Tensor

from .compiling import library, pointers
from .layout import DTYPES

__all__ = ["attend_pages"]


def attend_pages(
    query: Float[Tensor, "tokens heads dim"],
    cells: Float[Tensor, "blocks kv_heads cell"],
    tables: Int32[Tensor, "requests pages"],
    requests: Int64[Tensor, "requests 5"],
    *,
    page: int,
    scale: float,
) -> Float[Tensor, "tokens heads dim"]:
    """Attention output, float32, of the tokens of some requests; rows of other tokens are left undefined.

    Parameters
    ----------
    query : of all tokens of the batch; query heads that share a KV head lie side by side.
    cells : keys, values and counts of `page` entries, as `kvcluster.fast.vllm.pages` lays them out; the two last axes
        side by side in memory. Dim is a multiple of 16, page of 32.
    tables : blocks that hold the entries of each request, in order.
    requests : of each its first token in `query`, its number of tokens, its number of entries (its tokens last), and
        the first and the end of the places in its table whose blocks hold counts.

    Notes
    -----
    `softmax(scale * query . key + log(count)) @ value` in float32; a token sees the entries up to its own. One call
    does the whole batch, on all threads of torch; each key and value is read once for all query heads that share it.
    """
    scaled = (query.float() * scale).contiguous()
    output = torch.empty_like(scaled)
    _, heads, dim = query.shape
    shape = (
        *(len(requests), cells.shape[1], heads // cells.shape[1], dim),
        *(page, tables.shape[1], cells.stride(0), cells.stride(1), torch.get_num_threads()),
    )
    tables, requests = tables.contiguous(), requests.contiguous()
    attend = getattr(library("paged"), f"kvcluster_attend_pages_{DTYPES[cells.dtype]}")
    attend((ctypes.c_int64 * len(shape))(*shape), *pointers(requests, tables, scaled, cells, output))
    return output
