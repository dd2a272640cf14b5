"""Which implementation does the work: plain torch on any device, Triton kernels on CUDA, for attention C++ on CPUs."""

import functools
import importlib.util
import warnings
from typing import Literal

import torch
from torch import Tensor

from . import cpu

__all__ = ["AttentionBackend", "Backend", "choose_attention_backend", "choose_backend"]

Backend = Literal["auto", "torch", "triton"]
AttentionBackend = Literal["auto", "torch", "triton", "cpp"]
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


def choose_attention_backend(
    backend: str, query: Tensor, keys: Tensor, values: Tensor
) -> Literal["torch", "triton", "cpp"]:
    """The same for attention, where `cpp` is a fourth answer: for `auto`, on a CPU that has a compiler.

    Where gradients are wanted, only torch can answer.

    Raises
    ------
    ValueError : an unknown backend, or one that does not take these tensors.
    ModuleNotFoundError : triton, or a C++ compiler, where it is not installed.
    RuntimeError : the C++ compiler failed. With `auto` that is a warning, and torch does the work.
    """
    if backend not in ("auto", "torch", "triton", "cpp"):
        raise ValueError(f"backend must be 'auto', 'torch', 'triton' or 'cpp', got {backend!r}")
    arrays = (query, keys, values)
    wants_gradients = torch.is_grad_enabled() and any(array.requires_grad for array in arrays)
    if backend == "torch" or (backend == "auto" and wants_gradients):
        return "torch"
    if wants_gradients:
        raise ValueError(f"backend {backend!r} computes no gradients, got a tensor that requires one")
    if backend == "triton" or (backend == "auto" and query.is_cuda):
        return choose_backend(backend, *arrays)
    refused = refused_by_cpp(*arrays)
    if backend == "cpp":
        if refused is not None:
            raise ValueError(f"{refused} for backend 'cpp'")
        cpu.library("attention")
        return "cpp"
    return "cpp" if refused is None and has_cpp() else "torch"


def refused_by_cpp(query: Tensor, keys: Tensor, values: Tensor) -> str | None:
    """Why the C++ implementation does not take these tensors, None if it does."""
    if query.device.type != "cpu":
        return f"tensors must be on the CPU, got {query.device},"
    if keys.dtype != values.dtype or keys.dtype not in cpu.DTYPES:
        return f"keys and values must have one dtype, got {keys.dtype} and {values.dtype},"
    dims = keys.shape[-1], values.shape[-1]
    if dims[0] != dims[1] or dims[0] % cpu.LANES:
        return f"dim of keys and values must be equal and a multiple of {cpu.LANES}, got {dims[0]} and {dims[1]},"
    return None


@functools.cache  # a compiler that failed is not asked again at every step
def has_cpp() -> bool:
    """Whether the C++ implementation can be used; warns, once, where its compiler fails."""
    if cpu.compiler() is None:
        return False
    try:
        cpu.library("attention")
    except RuntimeError as error:
        warnings.warn(f"attention on the CPU is slower than it could be: {error}", stacklevel=2)
        return False
    return True
