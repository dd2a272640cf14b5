"""How chunks can be clustered: what every method has, and how files and command lines spell it.

A method is a small frozen value with a `compress`. A new one is a line of `METHODS`.
"""

from dataclasses import asdict, fields
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from .backends import AnyBackend
from .distinctive_matching import Distinctive
from .exact.chunks import CompressedChunks
from .soft_matching import SoftMatching

__all__ = ["METHODS", "Method", "method_of", "spelled"]


@runtime_checkable
class Method(Protocol):
    """What clusters the chunks of a cache."""

    def compress(
        self, keys: Tensor, values: Tensor, *, chunk_size: int, target: int, backend: AnyBackend = "auto"
    ) -> CompressedChunks:
        """Whole chunks in `target` clusters, which are fewer than `chunk_size`."""


METHODS: dict[str, Any] = {
    "soft_matching": SoftMatching,
    "distinctive": Distinctive,
}


def spelled(method: Method) -> dict[str, Any]:
    """`method` for JSON: its name and its parameters.

    Raises
    ------
    ValueError : a method that is not listed here.

    Examples
    --------
    >>> spelled(Distinctive(n_shared=3))
    {'name': 'distinctive', 'n_shared': 3}
    """
    names = {kind: name for name, kind in METHODS.items()}
    if type(method) not in names:
        raise ValueError(f"method must be one of {', '.join(METHODS)} to have a spelling, got {method!r}")
    parameters: Any = method
    return {"name": names[type(method)], **asdict(parameters)}


def method_of(name: str = "", **parameters: Any) -> Method:
    """The method of that name with these parameters: the inverse of `spelled`.

    Raises
    ------
    ValueError : an unknown name, or a parameter that the method does not have.
    """
    if name not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {name!r}")
    known = [field.name for field in fields(METHODS[name])]
    for parameter in parameters:
        if parameter not in known:
            raise ValueError(f"method {name!r} must have parameters among {known}, got {parameter!r}")
    method: Method = METHODS[name](**parameters)
    return method
