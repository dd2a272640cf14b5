"""Tensors that may be written to later, whatever mode the caller is in."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

__all__ = ["on_ordinary_tensors"]

P = ParamSpec("P")
R = TypeVar("R")


def on_ordinary_tensors(method: Callable[P, R]) -> Callable[P, R]:
    """`method` without autograd and outside of `torch.inference_mode`.

    What is made in that mode can be written to in it only; a cache filled in it is to go on without it.
    """

    @functools.wraps(method)
    def ordinary(*arguments: P.args, **named: P.kwargs) -> R:
        with torch.inference_mode(False), torch.no_grad():
            return method(*arguments, **named)

    return ordinary
