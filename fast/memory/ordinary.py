"""Memory that may be written to later, whatever mode the caller is in.

A tensor made within `torch.inference_mode` can be written to only there, but a cache filled there must go on outside.
"""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

__all__ = ["on_ordinary_tensors"]

P = ParamSpec("P")
R = TypeVar("R")


def on_ordinary_tensors(make: Callable[P, R]) -> Callable[P, R]:
    """`make`, which returns or keeps new tensors, without autograd and outside `torch.inference_mode`.

    It must not write to tensors that it did not make: these may belong to that mode, as copies made there do.
    """

    @functools.wraps(make)
    def ordinary(*arguments: P.args, **named: P.kwargs) -> R:
        with torch.inference_mode(False), torch.no_grad():
            return make(*arguments, **named)

    return ordinary
