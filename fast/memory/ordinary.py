"""Memory that may be written to later, whatever mode the caller is in.

What is made within `torch.inference_mode` can be written to within it only; a cache filled there is to go on outside.
"""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

__all__ = ["on_ordinary_tensors"]

P = ParamSpec("P")
R = TypeVar("R")


def on_ordinary_tensors(make: Callable[P, R]) -> Callable[P, R]:
    """`make`, which returns or keeps new tensors, without autograd and outside of `torch.inference_mode`.

    It must not write to tensors that it did not make: these may belong to that mode, as copies made there do.
    """

    @functools.wraps(make)
    def ordinary(*arguments: P.args, **named: P.kwargs) -> R:
        with torch.inference_mode(False), torch.no_grad():
            return make(*arguments, **named)

    return ordinary
