"""Changes that are made whole or not at all: if memory ends on the way, or Ctrl-C comes, a cache is as it was."""

import copy
import functools
from collections.abc import Callable
from typing import Any

__all__ = ["whole_or_not"]


def whole_or_not(change: Callable[..., Any]) -> Callable[..., Any]:
    """A method that changes an object, made to leave it as it was if anything fails on the way.

    The change is made to a second object with the same attributes, which are taken over by one assignment at the end.
    So a change may set attributes, but not write into the arrays and lists that are there.

    >>> class Numbers:
    ...     held = (), 0
    ...     @whole_or_not
    ...     def append(self, number):
    ...         self.held = (*self.held[0], number), self.held[1]
    ...         self.held = self.held[0], self.held[1] + 1 / number
    >>> numbers = Numbers()
    >>> for number in (2, 0):
    ...     try:
    ...         numbers.append(number)
    ...     except ZeroDivisionError:
    ...         print(numbers.held)
    ((2,), 0.5)
    """

    @functools.wraps(change)
    def changed(self: Any, *arguments: Any, **named: Any) -> Any:
        working = copy.copy(self)
        result = change(working, *arguments, **named)
        self.__dict__ = working.__dict__
        return result

    return changed
