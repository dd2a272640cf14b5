"""Inputs of the tests, awkward on purpose, and the passage between NumPy and torch without a change of bits."""

import ml_dtypes
import numpy as np
import pytest
import torch

DTYPES = {"f16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16), "f32": np.dtype(np.float32)}

KINDS = ("normal", "signs", "duplicates", "near_ties", "zeros", "huge", "tiny", "smooth")


def slowly(*values):
    """A case of a parametrized test that `make check` leaves out."""
    return pytest.param(*values, marks=pytest.mark.slow)


# every kind in every dtype; canonical scores take Triton's interpreter seconds, so few kinds that need many are quick
DTYPES_AND_KINDS = [
    (slowly, pytest.param)[kind in {"normal", "signs", "smooth"} or (dtype, kind) == ("f16", "near_ties")](dtype, kind)
    for dtype in DTYPES
    for kind in KINDS
]


def make_keys(kind: str, shape: tuple[int, ...], dtype: np.dtype, seed: int) -> np.ndarray:
    """Keys (..., tokens, dim) of one kind: signs give exact ties by the dozen, near_ties differ in the last bit."""
    rng = np.random.default_rng(seed)
    normal = rng.standard_normal(shape)
    if kind == "normal":
        keys = normal
    elif kind == "signs":
        keys = np.sign(normal)
    elif kind == "duplicates":
        keys = normal[..., rng.integers(0, max(1, shape[-2] // 3), shape[-2]), :] if shape[-2] else normal
    elif kind == "near_ties":
        one = np.ones(shape).astype(dtype)
        return np.where(rng.random(shape) < 0.2, np.nextafter(one, one * 2), one).astype(dtype)
    elif kind == "zeros":
        keys = normal * (rng.random((*shape[:-1], 1)) < 0.5)
    elif kind == "huge":
        keys = normal * (1e4 if dtype == np.float16 else 1e37)
    elif kind == "tiny":
        keys = normal * (1e-7 if dtype == np.float16 else 1e-40)  # subnormal
    else:
        keys = np.cumsum(normal, axis=-2)  # neighbours are alike, as in a model
    return keys.astype(dtype)


def skip_what_the_interpreter_misreads(kind: str, dtype: np.dtype) -> None:
    """Triton's interpreter turns subnormal bfloat16 numbers into others; the compiled kernels are not concerned."""
    if kind == "tiny" and dtype == DTYPES["bf16"] and not torch.cuda.is_available():
        pytest.skip("Triton's interpreter reads subnormal bfloat16 numbers wrongly")


def to_torch(array: np.ndarray) -> torch.Tensor:
    """The same bits as a tensor."""
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """The same bits as an array."""
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()
