"""What a benchmark must know and set about the machine it runs on."""

import ctypes
import os
import platform
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["describe", "keep_freed_memory", "read_all", "return_freed_memory"]

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # of mallopt in the GNU C library


def describe() -> dict[str, Any]:
    """What the numbers depend on; the load tells how much else was running at the start."""
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "load": round(os.getloadavg()[0], 2),
    }


def keep_freed_memory() -> None:
    """Let the C library keep what is freed, for the next allocation.

    Otherwise a cache that is copied at every step, as transformers' own is, gets fresh pages from the system each time,
    and its time would be that of page faults.
    """
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def return_freed_memory() -> None:
    """Let the C library give freed tensors back to the system, so that resident memory is what is in use."""
    mallopt(M_MMAP_THRESHOLD, 2**16)
    mallopt(M_TRIM_THRESHOLD, 2**16)


def mallopt(parameter: int, value: int) -> None:
    function: Callable[[int, int], int] | None = getattr(ctypes.CDLL(None), "mallopt", None)
    if function is not None:
        function(parameter, value)


def read_all(tensors: list[Tensor]) -> None:
    """Read every byte once, by a plain reduction: the measure of read bandwidth."""
    for tensor in tensors:
        tensor.sum()
