"""What `run.py` compares, by name: each takes keys (heads, tokens, dim) and a problem's chunk size and target."""

import torch
from torch import Tensor

from benchmarks.matching.plain import plain_compress, plain_compress_tiled
from kvcluster.fast import SoftMatching, chunked_soft_matching, merge
from kvcluster.fast.plain.soft_matching import compress

__all__ = ["CHUNK_SIZE", "CONTENDERS", "DIM", "HEADS", "KEEP_RATIO", "TARGET", "TOKENS", "random_keys"]

HEADS, TOKENS, DIM = 8, 32_768, 128
CHUNK_SIZE, KEEP_RATIO = 64, 0.25
TARGET = 16  # entries that a chunk becomes


def random_keys(tokens: int) -> Tensor:
    """Normal float32 keys (heads, tokens, dim)."""
    return torch.randn(HEADS, tokens, DIM, generator=torch.Generator().manual_seed(0))


def public_pair(keys: Tensor) -> object:
    """The two public calls: both check what they are given, and the second starts from labels alone."""
    clustering = chunked_soft_matching(keys, keep_ratio=KEEP_RATIO, chunk_size=CHUNK_SIZE)
    return clustering, merge(keys, clustering)


CONTENDERS = {
    "plain": lambda keys: plain_compress(keys, CHUNK_SIZE, TARGET),
    "plain, tiled": lambda keys: plain_compress_tiled(keys, CHUNK_SIZE, TARGET),
    "certified": lambda keys: SoftMatching().compress(keys, None, chunk_size=CHUNK_SIZE, target=TARGET),
    "certified, torch": lambda keys: compress(keys, None, chunk_size=CHUNK_SIZE, target=TARGET),
    "public pair": public_pair,
}
