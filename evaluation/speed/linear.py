"""Linear layers of few rows at memory speed; PyTorch's are far from it on CPUs."""

from typing import Any

import torch
from torch import Tensor, nn

from kvcluster.fast.cpu.layout import LANES
from kvcluster.fast.cpu.linear import linear

__all__ = ["hasten_linear_layers"]

MOST_ROWS = 64


def hasten_linear_layers(model: Any) -> Any:
    """`model` with its float32 linear layers done in C++ where there are few rows.

    This belongs to no cache, and every contender gets it: otherwise decoding on a CPU waits for the linear layers,
    whatever the cache.
    """
    for module in model.modules():
        is_plain = isinstance(module, nn.Linear) and module.bias is None and module.weight.dtype == torch.float32
        if is_plain and module.in_features % LANES == 0 and module.out_features % 4 == 0:
            module.forward = FewRows(module)
    return model


class FewRows:
    def __init__(self, module: nn.Linear) -> None:
        self.module = module

    def __call__(self, rows: Tensor) -> Tensor:
        weight = self.module.weight
        if rows.shape[:-1].numel() > MOST_ROWS:
            return nn.functional.linear(rows, weight)
        return linear(rows.reshape(-1, rows.shape[-1]).contiguous(), weight).reshape(*rows.shape[:-1], len(weight))
