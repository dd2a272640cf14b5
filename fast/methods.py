"""How chunks can be clustered: what every method has, and how files and command lines spell it.

A method is a small frozen value with a `compress`. A new one is a line of `METHODS`.
"""

from dataclasses import asdict, fields, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from .attended_matching import Attended
from .backends import AnyBackend
from .distinctive_matching import Distinctive
from .exact.chunks import CompressedChunks, Heads, HeadsOfTarget
from .outside import shown
from .soft_matching import SoftMatching

__all__ = ["METHODS", "Method", "compress_heads", "method_of", "spelled"]


@runtime_checkable
class Method(Protocol):
    """What clusters the chunks of a cache."""

    def compress(self, *arrays: Any, **rules: Any) -> CompressedChunks:
        """Whole chunks of keys and values in `target` clusters, which are fewer than `chunk_size`.

        `chunk_size`, `target` and `backend` come by name, and the `queries` of chunks if it has `needs_queries`.
        """


def compress_heads(
    method: Method,
    keys: Tensor,
    values: Tensor,
    *,
    chunk_size: int,
    heads_of_target: HeadsOfTarget,
    backend: AnyBackend = "auto",
    **queries: Any,
) -> list[tuple[Heads, CompressedChunks]]:
    """Whole chunks (..., heads, tokens, dim) of a layer whose heads have targets of their own.

    Each head becomes what it would if all heads had its target, as `kvcluster.reference.RaggedCache` has it. A method
    that can do better than compress all heads for each target has a `compress_heads` of its own. `queries` are given to
    a method that has `needs_queries`, those of each chunk, (..., heads, chunks, queries, dim).

    Returns
    -------
    For each target the heads that have it, and what has become of the chunks of these.
    """
    rules: dict[str, Any] = {"chunk_size": chunk_size, "backend": backend, **queries}
    own = getattr(method, "compress_heads", None)
    if own is not None:
        compressed: list[tuple[Heads, CompressedChunks]] = own(keys, values, heads_of_target=heads_of_target, **rules)
        return compressed
    return [
        (heads, chunks_of_heads(method.compress(keys, values, target=target, **rules), keys, heads))
        for target, heads in heads_of_target.items()
    ]


def chunks_of_heads(chunks: CompressedChunks, keys: Tensor, heads: Heads) -> CompressedChunks:
    """Of the chunks of all heads of `keys` (..., heads, tokens, dim) those of some."""
    shape, index = (keys.shape[:-3].numel(), keys.shape[-3], -1), torch.tensor(heads, device=keys.device)

    def part(array: Tensor) -> Tensor:
        return array.unflatten(0, shape)[:, index].flatten(0, 2)

    values = None if chunks.values is None else part(chunks.values)
    return replace(
        chunks, labels=part(chunks.labels), counts=part(chunks.counts), keys=part(chunks.keys), values=values
    )


METHODS: dict[str, Any] = {
    "soft_matching": SoftMatching,
    "distinctive": Distinctive,
    "attended": Attended,
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
    if not isinstance(name, str) or name not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {shown(name)}")
    known = [field.name for field in fields(METHODS[name])]
    for parameter in parameters:
        if parameter not in known:
            raise ValueError(f"method {name!r} must have parameters among {known}, got {shown(parameter)}")
    method: Method = METHODS[name](**parameters)
    return method
