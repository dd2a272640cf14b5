"""Counting what the reference really does: arrays that note every floating-point operation made with them.

`count` runs a function of `kvcluster.reference` as it is; only the name `np` in its modules stands for `CountingNumPy`
meanwhile, so that every array made there is a `CountedArray`.

An elementwise operation counts once for each number that it makes. A sum of n numbers is n - 1 additions, a maximum or
its place n - 1 comparisons; a product of matrices, (m, k) by (k, n), is m k n multiplications and m (k - 1) n
additions. Of a stable sort the sorted numbers are counted: its comparisons depend on the data, and are less than
n ceil(log2 n). Not counted: copies, conversions, changes of sign, the refusal of bad inputs, and integer arithmetic
(labels and counts).
"""

import contextlib
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any
from unittest import mock

import numpy as np

from kvcluster import reference

__all__ = ["Operations", "count"]

KIND_OF_UFUNC: dict[Any, str] = {
    **dict.fromkeys((np.add, np.subtract), "additions"),
    np.multiply: "multiplications",
    np.divide: "divisions",
    **dict.fromkeys((np.equal, np.not_equal, np.less, np.less_equal, np.greater, np.greater_equal), "comparisons"),
    **dict.fromkeys((np.maximum, np.minimum), "comparisons"),
    **dict.fromkeys((np.exp, np.log), "exponentials"),
}
FREE_UFUNCS = (np.negative, np.absolute, np.isfinite, np.invert, np.logical_and, np.bitwise_and, np.bitwise_or)
FREE_FUNCTIONS = (np.where, np.concatenate, np.swapaxes, np.moveaxis, np.broadcast_to, np.take_along_axis, np.split)
MAKERS = ("zeros", "empty", "full", "ones", "arange")


@dataclass(frozen=True)
class Operations:
    """Operations on floating-point numbers. `exponentials` are exponentials and logarithms together."""

    multiplications: int = 0
    additions: int = 0
    divisions: int = 0
    comparisons: int = 0
    exponentials: int = 0
    sorted: int = 0

    def __add__(self, other: "Operations") -> "Operations":
        return Operations(*(a + b for a, b in zip(self.as_tuple(), other.as_tuple(), strict=True)))

    def __mul__(self, times: int) -> "Operations":
        return Operations(*(times * number for number in self.as_tuple()))

    def as_tuple(self) -> tuple[int, ...]:
        return tuple(getattr(self, field.name) for field in fields(self))

    @property
    def total(self) -> int:
        """All of them; each sorted number counts as one."""
        return sum(self.as_tuple())


class Tally:
    """Where counted arrays write what was done with them."""

    def __init__(self) -> None:
        self.operations = dict.fromkeys((field.name for field in fields(Operations)), 0)

    def add(self, kind: str, number: int) -> None:
        self.operations[kind] += number


class CountedArray(np.ndarray):
    """An array whose floating-point operations are written into `tally`; what is made of it is counted too."""

    tally = Tally()

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, out: Any = None, **kwargs: Any) -> Any:
        operands = [uncounted(operand) for operand in inputs]
        if out is not None:
            kwargs["out"] = tuple(uncounted(array) for array in out)
        result = getattr(ufunc, method)(*operands, **kwargs)
        if any(np.asarray(operand).dtype.kind == "f" for operand in operands):
            self.note_ufunc(ufunc, method, operands, result)
        return counted(result)

    def note_ufunc(self, ufunc: Any, method: str, inputs: list[Any], result: Any) -> None:
        """Note the operations of one ufunc on floating-point numbers; refuse one whose cost is not defined."""
        if ufunc in FREE_UFUNCS:
            return
        if ufunc is np.matmul and method == "__call__":
            self.note_products(inputs[0].shape[-1], np.size(result))
        elif ufunc in KIND_OF_UFUNC and method == "__call__":
            self.tally.add(KIND_OF_UFUNC[ufunc], np.size(result))
        elif ufunc in KIND_OF_UFUNC and method == "reduce":
            self.tally.add(KIND_OF_UFUNC[ufunc], inputs[0].size - np.size(result))
        else:
            raise NotImplementedError(f"no cost is defined for {ufunc.__name__}.{method}")

    def note_products(self, summed: int, results: int) -> None:
        """Note `results` dot products of length `summed`."""
        self.tally.add("multiplications", summed * results)
        self.tally.add("additions", (summed - 1) * results)

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        result = func(*uncounted(list(args)), **{name: uncounted(value) for name, value in kwargs.items()})
        array = next((arg for arg in args if isinstance(arg, np.ndarray) and arg.dtype.kind == "f"), None)
        if array is None or func in FREE_FUNCTIONS:
            pass
        elif func is np.einsum:
            self.note_products(summed_extent(*args), result.size)
        elif func is np.argsort:
            self.tally.add("sorted", array.size)
        else:
            raise NotImplementedError(f"no cost is defined for {func.__name__}")
        return counted(result)

    def argmax(self, axis: Any = None, out: Any = None, **kwargs: Any) -> Any:
        result = uncounted(self).argmax(axis=axis, **kwargs)
        if self.dtype.kind == "f":
            self.tally.add("comparisons", self.size - result.size)
        return counted(result)


def summed_extent(subscripts: str, *operands: np.ndarray) -> int:
    """Numbers that each result of an einsum sums over."""
    inputs, output = subscripts.replace("...", "").split("->")
    extents = {
        letter: size
        for letters, operand in zip(inputs.split(","), operands, strict=True)
        for letter, size in zip(letters, operand.shape[-len(letters) :], strict=True)
    }
    return math.prod(size for letter, size in extents.items() if letter not in output)


class CountingNumPy:
    """NumPy, but arrays that it makes are counted."""

    def __getattr__(self, name: str) -> Any:
        function = getattr(np, name)
        return (lambda *args, **kwargs: counted(function(*args, **kwargs))) if name in MAKERS else function


def counted(result: Any) -> Any:
    if isinstance(result, list):
        return [counted(part) for part in result]
    return result.view(CountedArray) if isinstance(result, np.ndarray) else result


def uncounted(argument: Any) -> Any:
    if isinstance(argument, list | tuple):
        return type(argument)(uncounted(part) for part in argument)
    return argument.view(np.ndarray) if isinstance(argument, CountedArray) else argument


@contextlib.contextmanager
def counting() -> Iterator[Tally]:
    """While open, everything that `kvcluster.reference` does goes into the tally."""
    tally = Tally()
    with contextlib.ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            if name.startswith(f"{reference.__name__}.") and hasattr(module, "np"):
                stack.enter_context(mock.patch.object(module, "np", CountingNumPy()))
        stack.enter_context(mock.patch.object(CountedArray, "tally", tally))
        yield tally


def parts_of(result: Any) -> list[Any]:
    """An array, those of a tuple, or the attributes of a result."""
    if isinstance(result, np.ndarray | tuple):
        return list(result) if isinstance(result, tuple) else [result]
    return list(vars(result).values())


def count(function: Callable, *arrays: Any, **kwargs: Any) -> tuple[Operations, int, Any]:
    """The operations of `function(*arrays, **kwargs)`, bytes of the arrays that go in and come out, and its result."""
    with counting() as tally:
        result = function(*(counted(array) for array in arrays), **kwargs)
    moved = sum(array.nbytes for array in (*arrays, *parts_of(result)) if isinstance(array, np.ndarray))
    return Operations(**tally.operations), moved, result
