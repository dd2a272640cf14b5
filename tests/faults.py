"""Exceptions at every torch call and every executed line of a change, and what is left of the cache after each."""

import copy
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

__all__ = ["KINDS", "N_PLACES", "Fault", "SilentError", "bytes_of", "counted", "fault_at", "outcome", "places"]

FOLDERS = tuple(f"{Path(__file__).resolve().parents[1] / room}/" for room in ("fast", "reference"))
KINDS = ("torch call", "line")
N_PLACES = None if os.environ.get("KVCLUSTER_SOAK") else 20  # that are tried of each change; None: all


class Fault(BaseException):
    """As memory that is not there, or Ctrl-C: nothing may take it for a refusal."""


class SilentError(AssertionError):
    """A change has failed, and the cache is neither as it was, nor as it should be, nor does it refuse."""


class TorchCalls(TorchFunctionMode):
    """Raises at the call number `place`; counts all."""

    def __init__(self, place: int | None) -> None:
        super().__init__()
        self.place, self.n = place, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.n += 1
        if self.n - 1 == self.place:
            raise Fault(f"at {func}")
        return func(*args, **(kwargs or {}))


class Lines:
    """Raises before the executed line number `place` of the fast path or of the reference; counts all."""

    def __init__(self, place: int | None) -> None:
        self.place, self.n = place, 0

    def __enter__(self) -> "Lines":
        self.before = sys.gettrace()
        sys.settrace(self.of_call)
        return self

    def __exit__(self, *error: Any) -> None:
        sys.settrace(self.before)

    def of_call(self, frame: FrameType, event: str, argument: Any) -> Any:
        return self.of_line if frame.f_code.co_filename.startswith(FOLDERS) else None

    def of_line(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            self.n += 1
            if self.n - 1 == self.place:
                raise Fault(f"before {frame.f_code.co_filename}:{frame.f_lineno}")
        return self.of_line


@contextmanager
def fault_at(kind: str, place: int | None) -> Iterator[Any]:
    """Within, `Fault` at this place; None: only count the places.

    Whether gradients are on is as before, afterwards: where a line is that of a `with`, Python may raise before it
    leaves that, and `torch.no_grad` would last.
    """
    raising = TorchCalls(place) if kind == KINDS[0] else Lines(place)
    with torch.set_grad_enabled(torch.is_grad_enabled()), raising as places:
        yield places


def counted(kind: str, change: Callable[[Any], object], cache: Any) -> int:
    """How many places `change(cache)` has."""
    with fault_at(kind, None) as places:
        change(cache)
    return int(places.n)


def places(n: int, n_wanted: int | None) -> range:
    """About half of `n_wanted` of `n` places, evenly; None: all."""
    step = 1 if n_wanted is None else max(1, 2 * n // n_wanted)
    return range(n % step // 2, n, step)


def bytes_of(tensors: dict[str, torch.Tensor]) -> dict[str, bytes]:
    """What can be compared."""
    return {name: array.contiguous().view(torch.uint8).numpy().tobytes() for name, array in tensors.items()}


def outcome(
    kind: str,
    place: int,
    cache: Any,
    change: Callable[[Any], object],
    after: Any,
    signature: Callable[[Any], object],
    follow: Callable[[Any], object],
) -> str:
    """What `change` with a fault leaves of a copy of `cache`: "before", "after" or "refused".

    Parameters
    ----------
    after : `cache` after the change.
    signature : what two caches that hold the same have in common.
    follow : a later change, after which they still do.

    Raises
    ------
    SilentError : none of these.
    """
    faulty = copy.deepcopy(cache)
    try:
        with fault_at(kind, place):
            change(faulty)
        told = "no fault"
    except Fault as error:
        told = str(error)
    try:
        found = signature(faulty)
    except RuntimeError as error:
        if "failed halfway" not in str(error):
            raise SilentError(f"{told}: {error}") from error
        return "refused"
    right = copy.deepcopy(after)
    follow(right)
    result = "before" if found == signature(cache) else "after"
    try:
        if result == "before":
            change(faulty)
        follow(faulty)
    except Exception as error:
        raise SilentError(f"{told}: it does not go on: {error}") from error
    if signature(faulty) != signature(right):
        raise SilentError(f"{told}: it holds what it should not")
    return result
