"""Whether the arithmetic of this process is still that of the reference, after code of others has run in it.

A library that is linked with `-ffast-math` lets subnormal numbers be flushed to zero in all that runs beside it, and
whoever sets a rounding mode does so for all. The reference would then make the same mistakes, and agree.
"""

from typing import Any

import numpy as np

from kvcluster import reference

__all__ = ["DisturbedError", "Guard"]

SUBNORMAL = "subnormal numbers are flushed to zero (by torch.set_flush_denormal, or a library built with -ffast-math)"
ROUNDING = "numbers are not rounded to nearest (by fesetround, or a control register)"
ERRORS = "NumPy's error state is another one (by np.seterr: use np.errstate around your own code)"
REFERENCE = "the reference or NumPy gives other bits (something in them was replaced)"


class DisturbedError(Exception):
    """Nothing can be told any longer: an implementation changed what it is compared with."""


class Guard:
    """What the process was like before; `check` raises `DisturbedError` once it is not."""

    def __init__(self) -> None:
        self.errors = np.geterr()
        with np.errstate(all="ignore"):
            self.bits = bits_of_the_reference()

    def check(self, where: str) -> None:
        """Say what has changed; `where` is what has just run."""
        errors = np.geterr()
        with np.errstate(all="ignore"):
            if flushes():
                raise DisturbedError(f"{where} changed the arithmetic of its process: {SUBNORMAL}")
            if not rounds_to_nearest():
                raise DisturbedError(f"{where} changed the arithmetic of its process: {ROUNDING}")
            is_same = self.bits == bits_of_the_reference()
        if not is_same:
            raise DisturbedError(f"{where} changed its process: {REFERENCE}")
        if errors != self.errors:
            np.seterr(**self.errors)
            raise DisturbedError(f"{where} changed its process: {ERRORS}")


def flushes() -> bool:
    """Whether a subnormal product, or a subnormal factor, becomes zero, in float32 or float64."""
    products: list[Any] = []
    for number_type, half, scale in ((np.float32, 2.0**-70, 2.0**40), (np.float64, 2.0**-520, 2.0**60)):
        halves: Any = np.full(9, half, number_type)
        least: Any = np.ones(9, f"u{halves.itemsize}").view(
            number_type
        )  # the smallest number, which no arithmetic has seen
        products += [halves * halves, least * np.full(9, scale, number_type)]
    return not all((product.view(f"u{product.itemsize}") != 0).all() for product in products)


def rounds_to_nearest() -> bool:
    """Whether sums between two neighbours go to the nearest, and half of the way to the even one."""
    found: list[Any] = []
    for number_type in (np.float32, np.float64):
        one: Any = np.ones(9, number_type)
        eps = np.finfo(number_type).eps
        up, half = one * (eps * number_type(0.75)), one * (eps * number_type(0.5))
        found += [one + up > one, -one - up < -one, one + half == one, -one - half == -one]
    return all(each.all() for each in found)


def bits_of_the_reference() -> bytes:
    """Results of the reference that are exact, and therefore the same whenever they are asked for."""
    numbers = np.add.outer(np.arange(6), np.arange(5) ** 2 % 3).astype(np.float32) / np.float32(7)
    found = reference.chunked_soft_matching(numbers, keep_ratio=0.5, chunk_size=6)
    parts = reference.similarity(numbers, numbers), reference.merge(numbers, found), found.labels
    output = reference.attention(numbers[:1], numbers, numbers)
    return b"".join(np.ascontiguousarray(part).tobytes() for part in (*parts, output))
