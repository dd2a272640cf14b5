"""Which implementation does the work: the one place where a backend has a name.

`TABLE` has a row for each operation and a cell for each backend that can do it: plain torch on any device, Triton
kernels on CUDA, C++ on CPUs. All cells of a row are functions with the same arguments and, where the operation
decides something, the same bits. A new backend is a column here and its folder.
"""

import functools
import importlib
import importlib.util
import warnings
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .cpu.compiling import compiler, library
from .cpu.layout import DTYPES, LANES

__all__ = ["AnyBackend", "Backend", "cell", "choose", "implementation"]

Backend = Literal["auto", "torch", "triton"]
AnyBackend = Literal["auto", "torch", "triton", "cpp"]
Chosen = Literal["torch", "triton", "cpp"]
MAX_DIM = 256  # of the kernels


class Row(NamedTuple):
    """Where the implementations of one operation are, as "module:function" below this package; None: there is none."""

    torch: str
    triton: str | None = None
    cpp: str | None = None


TABLE = {
    "soft_matching": Row("plain.soft_matching:compress", "kernels.soft_matching:compress", "cpu.matching:compress"),
    "soft_matching_alone": Row(  # without means
        "plain.soft_matching:match", "kernels.soft_matching:match_chunks", "cpu.matching:match"
    ),
    "distinctiveness": Row(
        "plain.distinctive_matching:scores", "kernels.distinctive_matching:scores", "cpu.distinctive_matching:scores"
    ),
    "attention_margins": Row(
        "plain.attended_matching:attention_margins",
        "kernels.attended_matching:attention_margins",
        "cpu.attended_matching:attention_margins",
    ),
    "distinctive_matching": Row("plain.distinctive_matching:compress", "kernels.distinctive_matching:compress"),
    "pooled_matching": Row(
        "plain.pooled_matching:compress_entries",
        "kernels.pooled_matching:compress_entries",
        "cpu.pooled_matching:compress_entries",
    ),
    "merge": Row("exact.mean:ordered_mean", "kernels.merge:merge_clusters", "cpu.matching:merge_clusters"),
    "merge_entries": Row("plain.span_merging:merge_entries"),
    "attend": Row("plain.attention:attend", "kernels.attention:attend", "cpu.attention:attend"),
    "attend_checked": Row(
        "plain.attention:attend_checked", "kernels.attention:attend_checked", "cpu.attention:attend_checked"
    ),
    "attend_in_float64": Row("plain.attention:attend_in_float64"),
    "attend_ragged": Row(
        "plain.attention:attend_ragged", "kernels.attention:attend_ragged", "cpu.attention:attend_ragged"
    ),
    "attend_packed": Row("plain.attention:attend_packed", "kernels.packed:attend_packed", "cpu.packed:attend_packed"),
    "attend_places": Row(
        "plain.attention:attend_places", "kernels.attention:attend_places", "cpu.attention:attend_places"
    ),
    "attend_recalled": Row(
        "plain.attention:attend_recalled", "kernels.attention:attend_recalled", "cpu.recall:attend_recalled"
    ),
    "pack_blocks": Row("exact.blocks:pack", cpp="cpu.packed:pack_blocks"),
    "pack_rows": Row("exact.rows:pack_rows", cpp="cpu.rows:pack_rows"),
    "unpack_rows": Row("exact.rows:unpack_rows", cpp="cpu.rows:unpack_rows"),
    "kmeans": Row("plain.kmeans:fit", "kernels.kmeans:fit"),
    "cluster_means": Row("exact.mean:cluster_means", "kernels.kmeans:cluster_means"),
    "select_clusters": Row("plain.selection:take", "kernels.select:take"),
    "take": Row("plain.selection:take", "kernels.select:take", "cpu.recall:take"),  # of features in bfloat16
    "replace_clusters": Row("plain.tiers:replace_clusters", cpp="cpu.tiers:replace_clusters"),
    "bring": Row("plain.tiers:bring", cpp="cpu.tiers:bring"),
    "bring_clusters": Row("plain.tiers:bring_clusters"),
}


LIBRARIES = {  # the C++ file of each module
    "cpu.attended_matching": "attended",
    "cpu.attention": "attention",
    "cpu.distinctive_matching": "distinctive",
    "cpu.matching": "matching",
    "cpu.packed": "packed",
    "cpu.pooled_matching": "pooled",
    "cpu.recall": "recall",
    "cpu.rows": "rows",
    "cpu.tiers": "tiers",
}
OF_ANY_DIM = {"matching"}  # C++ files; the others need keys and values of one dim, a multiple of LANES


def implementation(operation: str, backend: str, *arrays: Tensor) -> Callable[..., Any]:
    """The function that does `operation` for `arrays`: the row's cell for what `choose` says."""
    return cell(operation, choose(operation, backend, *arrays))


def cell(operation: str, chosen: str) -> Callable[..., Any]:
    """The function in one cell; that of plain torch where the row has none for this backend, and for "auto"."""
    module, _, name = (getattr(TABLE[operation], chosen, None) or TABLE[operation].torch).partition(":")
    function: Callable[..., Any] = getattr(importlib.import_module(f"{__package__}.{module}"), name)
    return function


def choose(operation: str, backend: str, *arrays: Tensor) -> Chosen:
    """`backend` itself; for `auto`, of those in the row of `operation`, the fastest that takes `arrays`.

    That is triton where all arrays lie on CUDA, cpp on a CPU that has a compiler, else torch. Where gradients of
    attention are wanted, only torch can answer.

    Raises
    ------
    ValueError : an unknown backend, or one that does not take these tensors.
    ModuleNotFoundError : triton, or a C++ compiler, where it is not installed.
    RuntimeError : the C++ compiler failed. With `auto` that is a warning, and torch does the work.
    """
    row = TABLE[operation]
    if backend != "auto":
        check_backend(backend, row)
    wants_gradients = operation.startswith("attend") and needs_gradients(*arrays)
    if backend == "torch" or (backend == "auto" and wants_gradients):
        return "torch"
    if wants_gradients:
        raise ValueError(f"backend {backend!r} computes no gradients, got a tensor that requires one")
    if backend == "triton" or (backend == "auto" and row.triton is not None and all(array.is_cuda for array in arrays)):
        return choose_triton(backend, *arrays)
    if row.cpp is None:
        return "torch"
    name = LIBRARIES[row.cpp.partition(":")[0]]
    refused = refused_by_cpp(*arrays, has_any_dim=name in OF_ANY_DIM)
    if backend == "cpp":
        if refused is not None:
            raise ValueError(f"{refused} for backend 'cpp'")
        library(name)
        return "cpp"
    return "cpp" if refused is None and has_cpp(name) else "torch"


def check_backend(backend: str, row: Row) -> None:
    """Refuse a backend that has no cell in the row."""
    names = [name for name in Row._fields if getattr(row, name) is not None]
    if backend not in names:
        listed = ", ".join(repr(name) for name in ["auto", *names[:-1]])
        raise ValueError(f"backend must be {listed} or {names[-1]!r}, got {backend!r}")


def choose_triton(backend: str, *arrays: Tensor) -> Chosen:
    """Triton if it takes `arrays`; if not, an error, or torch for `auto`."""
    largest = max(array.shape[-1] for array in arrays)
    is_installed = importlib.util.find_spec("triton") is not None
    if backend == "auto":
        return "triton" if is_installed and largest <= MAX_DIM else "torch"
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


def needs_gradients(*arrays: Tensor) -> bool:
    return torch.is_grad_enabled() and any(array.requires_grad for array in arrays)


def refused_by_cpp(*arrays: Tensor, has_any_dim: bool) -> str | None:
    """Why the C++ implementation does not take these tensors, keys and values last; None if it does."""
    keys, values = (arrays * 2)[-2:]
    for array in arrays:
        if array.device.type != "cpu" or array.is_neg():
            what = "a negated view" if array.is_neg() else str(array.device)
            return f"tensors must be on the CPU and no negated views, got {what},"
    if keys.dtype != values.dtype or keys.dtype not in DTYPES:
        return f"keys and values must have one dtype, got {keys.dtype} and {values.dtype},"
    dims = keys.shape[-1], values.shape[-1]
    if not has_any_dim and (dims[0] != dims[1] or dims[0] % LANES):
        return f"dim of keys and values must be equal and a multiple of {LANES}, got {dims[0]} and {dims[1]},"
    return None


@functools.cache  # a compiler that failed is not asked again at every step
def has_cpp(name: str) -> bool:
    """Whether a library of C++ can be used; warns, once for each, where its compiler fails."""
    if compiler() is None:
        return False
    try:
        library(name)
    except RuntimeError as error:
        warnings.warn(f"{name} on the CPU is slower than it could be: {error}", stacklevel=2)
        return False
    return True
