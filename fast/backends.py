"""Which implementation does the work: plain torch on any device, or Triton kernels on CUDA."""

import importlib.util
from typing import Literal

from torch import Tensor

__all__ = ["Backend", "choose_backend"]

Backend = Literal["auto", "torch", "triton"]
MAX_DIM = 256  # of the kernels


def choose_backend(backend: str, *arrays: Tensor) -> Literal["torch", "triton"]:
    """`backend` itself, or for `auto` triton where all `arrays` lie on CUDA and the kernels take them, else torch.

    Raises
    ------
    ValueError : an unknown backend, or triton for tensors that its kernels do not take.
    ModuleNotFoundError : triton where it is not installed.
    """
    if backend not in ("auto", "torch", "triton"):
        raise ValueError(f"backend must be 'auto', 'torch' or 'triton', got {backend!r}")
    if backend == "torch":
        return "torch"
    largest = max(array.shape[-1] for array in arrays)
    is_installed = importlib.util.find_spec("triton") is not None
    if backend == "auto":
        return "triton" if is_installed and largest <= MAX_DIM and all(array.is_cuda for array in arrays) else "torch"
    if not is_installed:
        raise ModuleNotFoundError("backend 'triton' needs the package triton: pip install triton", name="triton")
    if largest > MAX_DIM:
        raise ValueError(f"dim must be at most {MAX_DIM} for backend 'triton', got {largest}")
    import triton

    device = next((array.device for array in arrays if not array.is_cuda), None)
    if device is not None and not triton.knobs.runtime.interpret:
        raise ValueError(
            f"backend 'triton' needs CUDA tensors, or TRITON_INTERPRET=1 in the environment, got a tensor on {device}"
        )
    return "triton"
