"""How the numbers of an array may lie in memory: not side by side, in another order, among others that are none."""

import random
from typing import Any

import numpy as np
import torch

from kvcluster.conformance.port import tensor_of

__all__ = ["laid_out", "numpy_laid_out"]


def laid_out(draw: random.Random, array: Any) -> Any:
    """A tensor with the numbers of a NumPy array, which do not lie side by side; numbers that are none between them."""
    if not isinstance(array, np.ndarray):
        return array
    tensor = tensor_of(np.ascontiguousarray(array)).reshape(array.shape)
    layout = draw.randrange(8)
    none = torch.nan if tensor.is_floating_point() else 1
    if layout == 0 and tensor.ndim > 1:
        return tensor.mT.contiguous().mT
    if layout == 1 and tensor.ndim:
        larger = tensor.new_full([n + 2 for n in tensor.shape], none)
        place = (slice(1, -1),) * tensor.ndim
        larger[place] = tensor
        return larger[place]
    if layout in (2, 3) and tensor.ndim >= layout:
        twice = [n * 2 if axis == tensor.ndim - layout + 1 else n for axis, n in enumerate(tensor.shape)]
        larger = tensor.new_full(twice, none)
        place = tuple(slice(None, None, 2 if n > m else 1) for n, m in zip(twice, tensor.shape, strict=True))
        larger[place] = tensor
        return larger[place]
    if layout == 4 and tensor.ndim > 2:
        return tensor.movedim(0, -1).contiguous().movedim(-1, 0)
    if layout == 5 and tensor.ndim and len(tensor) > 1 and bool((tensor == tensor[:1]).all()):
        return tensor[:1].expand(tensor.shape)
    if layout == 6 and tensor.is_floating_point():
        return torch._neg_view(-tensor)
    if layout == 7:
        larger = tensor.new_empty(tensor.numel() + 1)[1:]
        larger[:] = tensor.reshape(-1)
        return larger.view(tensor.shape)
    return tensor


def numpy_laid_out(draw: random.Random, array: Any) -> Any:
    if not isinstance(array, np.ndarray) or not array.ndim:
        return array
    return draw.choice((np.copy, np.asfortranarray, lambda array: array[..., ::-1].copy()[..., ::-1]))(array)
