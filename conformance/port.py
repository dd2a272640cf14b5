"""An implementation's names on its own kind of array: NumPy arrays are converted on the way in and on the way out."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from kvcluster import reference

from .inputs import DTYPES
from .raised import Raised, UnreadableError

__all__ = ["THE_REFERENCE", "Outcome", "Port", "parameters_of", "tensor_of"]

ARRAYS = ("numpy", "torch")
DTYPE_NAMES = ("f16", "bf16", "f32")


class Outcome(NamedTuple):
    """What a call gave.

    Attributes
    ----------
    arrays : by name, what it returned or shows.
    error : what it raised.
    skipped : why it was not put to the implementation.
    ended : how it ended instead of an answer: its process died, or it ran too long.
    """

    arrays: dict[str, np.ndarray]
    error: Raised | None = None
    skipped: str | None = None
    ended: str | None = None


class Port:
    """An object with some of the public names, called with NumPy arrays.

    Parameters
    ----------
    namespace : a module, or any object. It may also have `from_numpy`, which makes its kind of array of a NumPy array
        (bfloat16 is `ml_dtypes.bfloat16` there), and `to_numpy`, the way back; or `ARRAYS = "torch"`. By default it
        gets NumPy arrays, and what it returns is read through DLPack or `__array__`. `DTYPES`, a tuple of "f16",
        "bf16", "f32", says which it takes; all by default.

    Raises
    ------
    ValueError : `ARRAYS` or `DTYPES` is something else.
    """

    def __init__(self, namespace: Any, name: str | None = None) -> None:
        self.namespace = namespace
        self.name = str(name or getattr(namespace, "__name__", type(namespace).__name__))
        self.dtypes = dtypes_of(getattr(namespace, "DTYPES", DTYPE_NAMES))
        arrays = getattr(namespace, "ARRAYS", "numpy")
        if arrays not in ARRAYS:
            raise ValueError(f"ARRAYS must be one of {', '.join(ARRAYS)}, got {arrays!r}; or give from_numpy, to_numpy")
        self.from_numpy: Callable[[np.ndarray], Any] = getattr(
            namespace, "from_numpy", tensor_of if arrays == "torch" else np.array
        )
        self.to_numpy: Callable[[Any], np.ndarray] = reading(getattr(namespace, "to_numpy", array_of))
        self.number: Callable[[Any], np.ndarray] = reading(array_of)  # of an attribute that is no array

    def parts(self, names: tuple[str, ...], result: Any) -> dict[str, np.ndarray]:
        """The named arrays of a result: its attributes, the elements of a tuple, or itself."""
        if all(hasattr(result, name) for name in names):
            arrays = [getattr(result, name) for name in names]
        elif isinstance(result, tuple | list):
            if len(result) != len(names):
                raise UnreadableError(f"the result must be {', '.join(names)}, got {len(result)} values")
            arrays = list(result)
        elif len(names) == 1:
            arrays = [result]
        else:
            raise UnreadableError(f"the result must have {', '.join(names)}, got {type(result).__name__}")
        return {name: self.to_numpy(array) for name, array in zip(names, arrays, strict=True)}


def dtypes_of(names: Any) -> tuple[str, ...]:
    if not isinstance(names, tuple | list | set | frozenset) or not names or not set(names) <= set(DTYPE_NAMES):
        raise ValueError(f"DTYPES must be a tuple of some of {', '.join(DTYPE_NAMES)}, got {names!r}")
    return tuple(name for name in DTYPE_NAMES if name in names)


def reading(to_numpy: Callable[[Any], Any]) -> Callable[[Any], np.ndarray]:
    """`to_numpy` whose result is an array of numbers; whatever else comes is no refusal of the implementation."""

    def read(result: Any) -> np.ndarray:
        try:
            array = np.asarray(to_numpy(result))
        except Exception as error:
            raise UnreadableError(f"a result must be an array, got {type(result).__name__}: {error!r}") from error
        if array.dtype.kind not in "iufbV":  # a bfloat16 is of kind V
            raise UnreadableError(f"a result must be an array of numbers, got {type(result).__name__}")
        return array

    return read


def parameters_of(function: Callable[..., Any]) -> tuple[set[str], bool]:
    """Names of a function's or class's parameters, and whether it takes others too, or has no signature."""
    try:
        known = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return set(), True
    return set(known), any(parameter.kind == parameter.VAR_KEYWORD for parameter in known.values())


def tensor_of(array: np.ndarray) -> Any:
    """A torch tensor with the bits of a NumPy array."""
    import torch

    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def array_of(result: Any) -> np.ndarray:
    """Any kind of array as a NumPy array with the same bits."""
    if isinstance(result, np.ndarray | np.generic | list | tuple | int):
        return np.asarray(result)
    if hasattr(result, "detach"):  # a torch tensor, which may lie on a GPU and may be bfloat16
        import torch

        tensor = result.detach().cpu().contiguous()
        if tensor.dtype == torch.bfloat16:
            return tensor.view(torch.int16).numpy().view(DTYPES["bf16"])
        return tensor.numpy()
    return np.from_dlpack(result) if hasattr(result, "__dlpack__") else np.asarray(result)


THE_REFERENCE = Port(reference, "kvcluster.reference")
