"""Which tensors the C++ code takes."""

import torch

__all__ = ["DTYPES", "LANES"]

DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
LANES = 16  # dim must be a multiple of it
