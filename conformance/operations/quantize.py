"""`quantize`, and what goes wrong in the numbers of every cache with few bits."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from kvcluster.reference.quantization import GROUP, LARGEST_ZERO, PARTS, Quantized, up_to_bfloat16

from ..case import Case
from ..drawing import Drawing
from ..inputs import DTYPES, KINDS, make_array, refused_arrays
from ..mistake import Mistake, Patch
from ..operation import Operation, call_function
from ..port import Port
from ..quantizing import OF_NUMBERS, OF_RESULTS, PACKING, Wrong

__all__ = ["OPERATION", "QUANTIZING", "everywhere"]

BITS = (8, 4, 3, 2)
LENGTHS = (1, 5, 32, 33, 64, 100)
LARGEST = float(np.finfo(np.float32).max) / 2  # that is not refused


def cases(base: int) -> Iterator[Case]:
    for index, (dtype, kind) in enumerate((d, k) for d in DTYPES for k in KINDS):
        bits, numbers = BITS[(index + index // 8) % 4], LENGTHS[index % 6]
        array = make_array(kind, (2, 3, numbers), dtype, base + 400 + index)
        yield quantizing(f"{kind}-B{bits}-N{numbers}-{dtype}", array, bits)
    for bits in BITS:
        for numbers in LENGTHS:
            yield quantizing(f"B{bits}-N{numbers}", make_array("normal", (2, numbers), "f32", base + 430), bits)
        for dtype in DTYPES:
            yield quantizing(f"ties-B{bits}-{dtype}", ties(bits, dtype), bits)
        near = make_array("normal", (3, 70), "f32", base + 431) * np.float32(0.01)
        yield quantizing(f"offset-B{bits}", near + np.array([[1], [-1e3], [1e6]], np.float32), bits)
    ends = [[3, -3 * 2.0**-27, 1], [5.625, -0.9 * 2.0**-22, 1], [5, 0, 1]]  # 3 steps of bfloat16, and hardly more
    yield quantizing("range-just-above", np.array(ends, np.float32), 2)
    for bits in (8, 2):
        constants = np.array([0.1, -7, 2.0**-140, 1e30, LARGEST_ZERO, -LARGEST_ZERO, 0, -0.0], np.float32)
        yield quantizing(f"constant-B{bits}", constants[:, None].repeat(40, axis=1), bits)
        smallest = np.float32(2.0**-149) * np.array([[0, 1, 1], [-200, 1, 55], [9000, 0, 1]], np.float32)
        yield quantizing(f"smallest-B{bits}", smallest, bits)
        large = make_array("normal", (2, 40), "f32", base + 432) * np.float32(2.0**124)
        large[0, :2], large[1, 1] = (LARGEST, -LARGEST), -LARGEST
        yield quantizing(f"large-B{bits}", large, bits)
    zeros = make_array("normal", (3, 70), "f16", base + 433)
    zeros[0], zeros[1, :32], zeros[2, 60:] = 0, -0.0, 0
    yield quantizing("groups-of-zeros", zeros, 4)
    outliers = make_array("normal", (4, 96), "bf16" if "bf16" in DTYPES else "f32", base + 434)
    outliers[:, ::40] *= 50
    yield quantizing("outliers", outliers, 3)
    yield quantizing("batch-and-heads", make_array("smooth", (2, 3, 4, 40), "f16", base + 435), 4)
    yield quantizing("no-rows", np.ones((2, 0, 40), np.float32), 4)
    yield quantizing("no-batch", np.ones((0, 2, 40), np.float32), 3)


def quantizing(name: str, array: np.ndarray, bits: int) -> Case:
    return Case("quantize", name, {"array": array}, {"bits": bits})


def ties(bits: int, dtype: str) -> np.ndarray:
    """Numbers in the middle between two steps of 1, 1, 1 and 3 / 256, then between two sixteenths of a step."""
    number_type: Any = DTYPES[dtype]
    top = 2**bits - 1
    whole = np.arange(32) * top // 31
    inner = np.where(whole % top == 0, whole, whole + 0.5)
    return np.stack([inner, inner + 0.25, -inner, 3 * (inner - 1.5) / 256, whole - 1 / 32]).astype(number_type)


def refused() -> Iterator[Case]:
    array, bad = refused_arrays()
    rules: list[tuple[str, np.ndarray, Any]] = [(name, wrong, 4) for name, wrong in bad.items()]
    rules += [("beyond", np.nextafter(np.full((1, 4), LARGEST, np.float32), np.float32(np.inf)), 4)]
    rules += [
        ("integers", np.ones((2, 8), np.int32), 4),
        ("one-axis", array[0, 0], 4),
        ("no-numbers", array[..., :0], 4),
    ]
    rules += [(f"bits-{bits}", array, bits) for bits in (16, 5, 1, 0, -4, 4.0, "4", True)]
    for name, wrong, bits in rules:
        yield Case("quantize", f"refused-{name}", {"array": wrong}, {"bits": bits}, is_refused=True)


def small(draw: Drawing) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Halves give ties, which other numbers hardly do."""
    draw.dim = draw.one_of((1, 2, 3, 5, 33))
    array = draw.rows(draw.integer(1, 2))
    if draw.integer(0, 1):
        array = np.array(draw.integers(array.size, -3, 7), np.float32).reshape(array.shape) / 2
        array = array.astype(draw.dtype)
    return {"array": array}, {"bits": draw.one_of(BITS)}


def call(operation: Operation, port: Port, case: Case) -> dict[str, np.ndarray]:
    """Codes are integers like any others; scales may be bfloat16, which is what they are."""
    results = call_function(operation, port, case)
    if results["codes"].dtype == np.uint8:
        results["codes"] = results["codes"].astype(np.int64)
    if results["scales"].dtype.name == "bfloat16":
        results["scales"] = results["scales"].astype(np.float32)
    return results


def decisions(case: Case) -> Iterator[str]:
    """A line for each group of the first leading index, and one for each number in it."""
    array, top = case.arrays["array"], 2 ** case.parameters["bits"] - 1
    for row, numbers in enumerate(array[(0,) * (array.ndim - 2)].astype(np.float64)):
        for group, first in enumerate(range(0, len(numbers), GROUP)):
            of_group = numbers[first : first + GROUP]
            low, high = of_group.min(), of_group.max()
            least = max((high - low) / top, max(abs(low), abs(high)) / LARGEST_ZERO)
            scale = float(up_to_bfloat16(np.array([least], np.float32))[0])
            zero = 0 if scale == 0 else -round(PARTS * low / scale)
            yield f"row {row}, group {group}, from {low:.9g} to {high:.9g}: scale {scale:.9g}, not below {least:.17g}"
            for number in of_group if scale else ():
                steps = number / scale + zero / PARTS
                line = f"  {number:.9g} is {steps:.17g} scales with the zero {zero} / {PARTS}: code {round(steps)}"
                yield line + ("; halfway, to the even number" if abs(steps % 1) == 0.5 else "")


def everywhere(function: Callable[..., Quantized]) -> tuple[Patch, ...]:
    """A wrong `quantize` wherever the reference uses it."""
    return tuple((place, "quantize", function) for place in ("", "quantization"))


def mistakes(wrong: tuple[Wrong, ...]) -> tuple[Mistake, ...]:
    return tuple(Mistake(each.cause, each.rule, everywhere(each.function)) for each in wrong)


QUANTIZING = mistakes(OF_NUMBERS)
OPERATION = Operation(
    name="quantize",
    section=19,
    results=("codes", "scales", "zeros"),
    cases=cases,
    refused=refused,
    small=small,
    call=call,
    decisions=decisions,
    mistakes=(*QUANTIZING, *mistakes(OF_RESULTS), *PACKING),
    scaffold='''
def quantize(array, *, bits):
    """codes (..., groups, 4 * bits) uint8, scales (..., groups) float32 or bfloat16, zeros (..., groups) int16."""
    return my_package.quantize(array, bits)
''',
)
