"""Quantized entries in C++."""

import ctypes
import itertools

import torch
from torch import Tensor

from ..exact.blocks import BlockLayout, Packed
from ..exact.quantization import GROUP
from .compiling import library, pointers
from .layout import DTYPES

__all__ = ["attend_packed", "pack_blocks"]


def pack_blocks(keys: Tensor, values: Tensor, counts: Tensor, layout: BlockLayout) -> Tensor:
    """As `kvcluster.fast.exact.blocks.pack`, on keys and values of one dtype."""
    lead, entries = keys.shape[:-2], keys.shape[-2]
    keys, values = (x.reshape(lead.numel(), *x.shape[-2:]) for x in (keys, values))
    counts = counts.to(torch.int32).reshape(lead.numel(), entries)
    keys, values = (x if x.stride(-1) == 1 else x.contiguous() for x in (keys, values))
    blocks = keys.new_empty(*lead, entries // GROUP, layout.nbytes, dtype=torch.uint8)
    strides = [stride for x in (keys, values, counts) for stride in x.stride()[:2]]
    sizes = lead.numel(), entries // GROUP, layout.dim_value, *layout.bits, torch.get_num_threads(), *strides
    shape = *sizes, layout.dim, layout.nbytes, *places_of(layout)
    getattr(library("packed"), f"kvcluster_pack_{DTYPES[keys.dtype]}")(
        (ctypes.c_int64 * len(shape))(*shape), *pointers(keys, values, counts, blocks)
    )
    return blocks


def attend_packed(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    counts: Tensor,
    lengths: tuple[int, ...],
    firsts: tuple[int, ...],
    packed: Packed,
    queries: int,
    scale: float,
) -> Tensor:
    """As `kvcluster.fast.plain.attention.attend_packed`, in one call that reads codes and entries where they lie."""
    keys, values, counts = (
        x if all(row.is_contiguous() for row in x[:1]) else x.contiguous() for x in (keys, values, counts)
    )
    batch, kv_heads, rows, dim = query.shape
    scaled = (query.float() * scale).contiguous()
    output = torch.empty_like(scaled)
    strides = keys.stride(0), values.stride(0), counts.stride(0), packed.blocks.stride(0)
    layout = packed.layout
    sizes = batch * kv_heads, kv_heads, rows, queries, torch.get_num_threads(), *layout.bits
    shape = (*sizes, *strides, dim, layout.nbytes, *places_of(layout))
    heads = zip(lengths, firsts, packed.lengths, packed.firsts, strict=True)
    getattr(library("packed"), f"kvcluster_attend_packed_{DTYPES[keys.dtype]}")(
        *((ctypes.c_int64 * len(x))(*x) for x in (shape, tuple(itertools.chain(*heads)))),
        *pointers(scaled, keys, values, counts, packed.blocks, output),
    )
    return output.to(query.dtype)


def places_of(layout: BlockLayout) -> tuple[int, ...]:
    """Where the parts of a block begin, but for the first one, in bytes."""
    return tuple(itertools.accumulate(layout.sizes))[:-1]
