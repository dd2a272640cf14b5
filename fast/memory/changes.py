"""Changes of a cache that are made whole or not at all, whatever fails on the way: memory, an operator, Ctrl-C.

A change is made to a second object with the attributes of the cache, and taken over by one assignment. What makes all
it needs anew, and writes into no entry that is there, leaves the cache as it was if it fails (`attempt`). What writes
where entries are takes them away from the cache for as long as it lasts: if it fails, the cache refuses everything
(`change`).
"""

import copy
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

from jaxtyping import Int64
from torch import Tensor

from ..arguments import check_rows
from ..scalars import check_integer
from .ordinary import on_ordinary_tensors

__all__ = ["AllOrNothing", "Withheld", "attempt", "change", "selected", "take_over", "withhold", "worked_on"]

C = TypeVar("C")


@runtime_checkable
class OfRows(Protocol):
    """What can be narrowed to some of its rows."""

    def select_rows(self, indices: Tensor, /) -> None: ...


P = TypeVar("P", bound=OfRows)


class Withheld:
    """What says, whatever is asked of it, that an earlier change has failed halfway."""

    if not TYPE_CHECKING:  # else all attributes were known to a type checker

        def __getattr__(self, name: str) -> Any:
            halfway = self.__dict__.get("_halfway")
            if halfway is None:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            raise RuntimeError(
                f"an earlier {halfway} of this {type(self).__name__} failed halfway and what it held is lost: make a "
                "new one, or call reset() of the model's cache"
            )


def worked_on(cache: C) -> C:
    """An object like `cache`, to make a change to."""
    working = object.__new__(type(cache))
    working.__dict__ = dict(cache.__dict__)
    return working


def withhold(cache: object, name: str) -> None:
    """Let `cache` hold nothing until a change, called `name`, is taken over."""
    cache.__dict__ = {"_halfway": name}


def take_over(cache: object, working: object) -> None:
    """Let `cache` be what has been made of it."""
    cache.__dict__ = working.__dict__


def attempt(cache: object, name: str, *arguments: Any) -> None:
    """Call the method `name`, which may set attributes but not write into what they hold."""
    working = worked_on(cache)
    getattr(working, name)(*arguments)
    take_over(cache, working)


def change(cache: object, name: str, *arguments: Any) -> None:
    """Call the method `name`, which may write anywhere."""
    working = worked_on(cache)
    withhold(cache, name.removeprefix("_"))
    getattr(working, name)(*arguments)
    take_over(cache, working)


def selected(part: P, rows: Tensor) -> P:
    """A copy of a part of a cache with these rows, for an `attempt`."""
    copied = copy.copy(part)
    copied.select_rows(rows)
    return copied


class AllOrNothing(Withheld):
    """A cache of one layer, with its changes; a subclass says what they do, and what is refused before.

    `_extend`, `_select` and `_restore` make everything new; `_cluster` and `_crop` may write where entries are.
    """

    _kept_for_good = "older tokens are clustered for good"

    def _append(self, *tokens: Tensor) -> Any:
        """Take tokens that have been checked and cluster what is due; returns `_seen` just before this clustering."""
        working: Any = worked_on(self)
        working._extend(*tokens)
        seen = working._seen()
        if working.is_due:
            working._check_due()
            withhold(self, "append")
            working._cluster()
        take_over(self, working)
        return seen

    def _seen(self) -> Any:
        """What `append` returns, which the clustering that is due must not change."""

    def extend(self, keys: Tensor, values: Tensor) -> None:
        """The first half of `append`: take the next tokens, exact as yet."""
        self.check_new(keys, values)
        attempt(self, "_extend", keys, values)

    @property
    def is_due(self) -> bool:
        """Whether there is something to cluster."""
        return False

    @property
    def n_rows(self) -> int:
        """Size of the first leading axis; 0 at first."""
        raise NotImplementedError

    @property
    def n_croppable(self) -> int:
        """The most tokens that `crop` can remove now."""
        raise NotImplementedError

    def cluster(self) -> None:
        """The second half of `append`: cluster what is due, by the rule of the class."""
        if self.is_due:
            self._check_due()
            change(self, "_cluster")

    def crop(self, n_tokens: int) -> None:
        """Remove the last `n_tokens` tokens: the cache is then, bit for bit, as if they had never come.

        Raises
        ------
        TypeError : not an integer.
        ValueError : less than 0 or more than `n_croppable`. The cache is then as it was.
        """
        change(self, "_crop", self._check_crop(n_tokens))

    @on_ordinary_tensors
    def select(self, indices: Int64[Tensor, " batch"]) -> None:
        """Keep the rows `indices` of the first axis, in their order; a row may be taken more than once (beams)."""
        if self.n_rows:
            check_rows(indices, self.n_rows)
        attempt(self, "_select", indices)

    def restore(self, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        """Take over copies of the `state` of a cache with the same parameters; this one must be empty."""
        attempt(self, "_restore", tensors, numbers)

    def check_new(self, keys: Tensor, values: Tensor) -> None:
        """Refuse tokens that cannot be appended."""

    def _check_due(self) -> None:
        """Refuse to cluster what cannot be."""

    def _check_crop(self, n_tokens: int) -> int:
        """`n_tokens`; refuse a number of tokens that cannot be removed."""
        n_tokens = check_integer("n_tokens", n_tokens, least=0)
        if n_tokens > self.n_croppable:
            raise ValueError(f"n_tokens must be at most {self.n_croppable}, {self._kept_for_good}, got {n_tokens}")
        return n_tokens
