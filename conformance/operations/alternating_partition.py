"""`alternating_partition`."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from kvcluster.reference.partition import alternating_partition

from ..case import Case
from ..drawing import Drawing
from ..mistake import Mistake
from ..operation import Operation
from ..port import Port

__all__ = ["OPERATION", "PARTITION"]


def cases(base: int) -> Iterator[Case]:
    for size in (0, 1, 2, 3, 64, 65):
        yield Case("alternating_partition", f"size{size}", {}, {"size": size})


def small(draw: Drawing) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    return {}, {"size": draw.integer(0, 6)}


def call(operation: Operation, port: Port, case: Case) -> dict[str, np.ndarray]:
    return port.parts(operation.results, port.namespace.alternating_partition(case.parameters["size"]))


def swapped(size: int) -> tuple[np.ndarray, np.ndarray]:
    return alternating_partition(size)[::-1]


PARTITION = (
    Mistake(
        "sources and destinations are swapped: even entries are sources, odd ones destinations",
        "3.1",
        tuple((place, "alternating_partition", swapped) for place in ("", "soft_matching", "pooled_matching")),
    ),
)
OPERATION = Operation(
    name="alternating_partition",
    section=3,
    results=("sources", "destinations"),
    cases=cases,
    refused=lambda: iter(()),
    small=small,
    call=call,
    mistakes=PARTITION,
    scaffold='''
def alternating_partition(size):
    """sources, destinations: indices."""
    return my_package.partition(size)
''',
)
