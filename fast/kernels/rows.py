"""Reading the entries of one chunk, wherever the strides of the tensor put them."""

import triton
import triton.language as tl

__all__ = ["chunk_base", "load_rows"]


@triton.jit
def chunk_base(keys, heads, chunks, stride_batch, stride_head, stride_token, size):
    """Where the chunk of this program begins: programs count the chunks of all heads of all batch rows."""
    chunk = tl.program_id(0) % chunks
    head = tl.program_id(0) // chunks
    base = keys + (head // heads).to(tl.int64) * stride_batch + (head % heads).to(tl.int64) * stride_head
    return base + (chunk * size).to(tl.int64) * stride_token


@triton.jit
def load_rows(base, entry, is_there, stride_token, stride_dim, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """Keys of the entries `entry` (rows,), zeros where there are none: (rows, BLOCK_DIM)."""
    feature = tl.arange(0, BLOCK_DIM)
    pointers = base + entry[:, None] * stride_token + feature[None, :] * stride_dim
    return tl.load(pointers, mask=is_there[:, None] & (feature < DIM)[None, :], other=0.0)
