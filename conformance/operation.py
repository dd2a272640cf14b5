"""What the suite must know about an operation; each file of `operations` says it about one."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from .case import Case
from .drawing import Drawing
from .mistake import Mistake
from .port import Port

__all__ = ["Operation", "Spelling", "call_function", "plain_spelling"]

Spelling = tuple[Callable[..., Any], dict[str, Any]]


def plain_spelling(port: Port, case: Case) -> Spelling:
    """The function of this name, with the parameters of the case."""
    return getattr(port.namespace, case.operation), dict(case.parameters)


def call_function(operation: "Operation", port: Port, case: Case) -> dict[str, np.ndarray]:
    """Call with arrays by position, except those of `by_name`, and parameters by name."""
    function, parameters = operation.spelling(port, case)
    by_name = {name: port.from_numpy(case.arrays[name]) for name in operation.by_name if name in case.arrays}
    result = function(*operation.positional(operation, port, case), **by_name, **parameters)
    shown = {name: port.to_numpy(getattr(result, name)) for name in operation.shown if hasattr(result, name)}
    return port.parts(operation.results, result) | shown


def arrays_in_order(operation: "Operation", port: Port, case: Case) -> list[Any]:
    """The arrays that are passed by position."""
    return [port.from_numpy(array) for name, array in case.arrays.items() if name not in operation.by_name]


@dataclass(frozen=True)
class Operation:
    """A public name of `kvcluster.reference`, its cases, and what can go wrong.

    Attributes
    ----------
    name : a function or a class.
    section : the section of SPECIFICATION.md that its results follow.
    results : what a function returns, by name.
    shown : what its result may have beside, which is compared where it is there.
    cases : its inputs, with seeds from the given number on, a thousand times the seed of the suite.
    refused : calls that must raise.
    small : arrays and parameters of a small case, drawn in the search for a counterexample.
    mistakes : what is known to go wrong; of two that explain equally many failures, the first is named.
    scaffold : how an adapter to be filled in begins.
    by_name : arrays that are passed by name; the others are passed by position.
    options : parameters that not every implementation has.
    spelling : what is called, and its parameters as the port spells them.
    positional : the arguments by position.
    call : the whole call, where it is not that of a function.
    oracle : query, keys, values, counts and scale of the attention that a case amounts to, if any.
    decisions : how the reference decides the first leading index of a case, in words.
    pattern : a cause and its paragraph for failures of these kinds (how the names of cases begin) in these results.
    """

    name: str
    section: int
    cases: Callable[[int], Iterator[Case]]
    refused: Callable[[], Iterator[Case]]
    small: Callable[[Drawing], tuple[dict[str, np.ndarray], dict[str, Any]]]
    mistakes: tuple[Mistake, ...]
    scaffold: str
    results: tuple[str, ...] = ()
    shown: tuple[str, ...] = ()
    by_name: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    spelling: Callable[[Port, Case], Spelling] = plain_spelling
    positional: Callable[["Operation", Port, Case], list[Any]] = arrays_in_order
    call: Callable[["Operation", Port, Case], dict[str, np.ndarray]] = call_function
    oracle: Callable[[Case], tuple[Any, ...]] | None = None
    decisions: Callable[[Case], Iterator[str]] = lambda case: iter(())
    pattern: Callable[[set[str], set[str]], tuple[str, str] | None] = lambda kinds, results: None

    def has_option(self, case: Case) -> bool:
        """Whether a case has an option."""
        return bool(set(self.options) & set(case.parameters))
