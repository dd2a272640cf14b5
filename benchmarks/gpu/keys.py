"""Keys of awkward kinds as torch tensors, made with torch alone: a GPU machine may lack NumPy's bfloat16.

The NumPy reference gets them as float32, to which every number of the 16-bit dtypes converts exactly.
"""

import numpy as np
import torch
from torch import Tensor

__all__ = ["DTYPES", "KINDS", "make_keys", "same_bits", "to_float32"]

KINDS = ("normal", "signs", "duplicates", "near ties", "zeros", "huge", "tiny")
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def make_keys(kind: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Keys (..., tokens, dim) on the CPU: signs give exact ties by the dozen, near ties differ in the last bit."""
    rng = torch.Generator().manual_seed(seed)
    keys = torch.randn(shape, generator=rng, dtype=torch.float64)
    is_half = dtype == torch.float16
    if kind == "signs":
        keys = keys.sign()
    elif kind == "duplicates":
        keys = keys[..., torch.randint(max(1, shape[-2] // 3), (shape[-2],), generator=rng), :]
    elif kind == "near ties":
        keys = 1 + torch.finfo(dtype).eps * (torch.rand(shape, generator=rng) < 0.2)
    elif kind == "zeros":
        keys = keys * (torch.rand((*shape[:-1], 1), generator=rng) < 0.5)
    elif kind == "huge":
        keys = keys * (1e4 if is_half else 1e37)
    elif kind == "tiny":
        keys = keys * (1e-7 if is_half else 1e-40)  # subnormal
    return keys.to(dtype)


def to_float32(tensor: Tensor) -> np.ndarray:
    """The same numbers."""
    return tensor.detach().cpu().float().numpy()


def same_bits(ours: Tensor, theirs: Tensor | np.ndarray) -> bool:
    """Whether shape, dtype and bytes are equal; of NaN too, and of the sign of zeros."""
    ours, theirs = ours.detach().cpu(), torch.as_tensor(theirs).detach().cpu()
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return False
    return torch.equal(ours.contiguous().view(torch.uint8), theirs.contiguous().view(torch.uint8))
