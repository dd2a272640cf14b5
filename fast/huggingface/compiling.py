"""What torch.compile leaves as it is."""

from collections.abc import Callable
from typing import ParamSpec, TypeVar, cast

import torch

__all__ = ["uncompiled"]

P = ParamSpec("P")
R = TypeVar("R")
REASON = "kvcluster's caches decide exactly, as their source says: compile the model without fullgraph=True"


def uncompiled(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, called by a compiled model as it is: a compiler may reorder or fuse what has to be exact.

    Tracing it would also be slow: caches change their shapes with every token, and again with every chunk.
    """
    return cast(Callable[P, R], torch.compiler.disable(function, reason=REASON))
