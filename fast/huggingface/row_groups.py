"""The rows of a batch: those with the same left padding share a cache that begins with their first real token."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..arguments import check_rows
from ..memory.changes import Withheld, change
from ..memory.ordinary import on_ordinary_tensors
from ..memory.work import ClusteringWork
from .stored import Sizes, check_groups, check_stored

__all__ = ["RowGroup", "RowGroups"]


@dataclass
class RowGroup:
    """Rows of the batch, `rows` (n,), int64, whose first `padding` tokens so far are padding, and their cache.

    `rows` is None where no row has padding: the group is all rows, in their order.
    """

    padding: int
    rows: Tensor | None
    cache: Any


class RowGroups(Withheld):
    """The cache of one layer for all rows of a batch: a cache of `kvcluster.fast` for each padding that occurs.

    Parameters
    ----------
    make : makes an empty cache of `kvcluster.fast`.

    Attributes
    ----------
    groups : list of `RowGroup`; one of all rows if there is no padding. A row that is all padding so far is in a group
        whose cache is empty.
    n_seen : tokens so far, padding included.
    n_stored : entries held per KV head for the rows that have most; `nbytes`, `work`: of all groups.

    Notes
    -----
    Padding is never stored. Each row's cache is, bit for bit, that of the row without padding. Costs one call of
    attention for each padding that occurs.
    """

    def __init__(self, make: Callable[[], Any]) -> None:
        self.make = make
        self.groups = [RowGroup(0, None, make())]
        self._examples: dict[str, Tensor] = {}  # empty ones of keys, values and counts

    @property
    def caches(self) -> list[Any]:
        """The caches of `kvcluster.fast`: one, or one for each padding in the batch."""
        return [group.cache for group in self.groups]

    @property
    def is_padded(self) -> bool:
        """Whether some row has padding."""
        return any(group.rows is not None for group in self.groups)

    @property
    def n_seen(self) -> int:
        return self.groups[0].padding + self.groups[0].cache.n_seen if self.groups else 0

    @property
    def lengths(self) -> set[int]:
        """`n_seen` by each group: one number, unless a call failed halfway."""
        return {group.padding + group.cache.n_seen for group in self.groups}

    @property
    def n_rows(self) -> int:
        return sum(group.cache.n_rows if group.rows is None else len(group.rows) for group in self.groups)

    @property
    def n_stored(self) -> int:
        return max((cache.n_stored for cache in self.caches), default=0)

    @property
    def width(self) -> int:
        """Entries of the KV head that has most of them: with whole heads the tokens of the longest row."""
        return max((cache.width for cache in self.caches), default=0)

    @property
    def n_croppable(self) -> int:
        """The most tokens that `crop` can remove now."""
        most = [
            group.cache.n_croppable
            if group.cache.n_croppable < group.cache.n_seen
            else group.cache.n_seen + group.padding
            for group in self.groups
        ]
        return min(most, default=0)

    @property
    def nbytes(self) -> int:
        return sum(cache.nbytes for cache in self.caches)

    @property
    def nbytes_reserved(self) -> int:
        return sum(cache.nbytes_reserved for cache in self.caches)

    @property
    def work(self) -> ClusteringWork:
        return sum((cache.work for cache in self.caches), ClusteringWork())

    @property
    def padding(self) -> list[int]:
        """Padding of each row, in the order of the rows."""
        padding_of_row = {row: group.padding for group in self.groups for row in self._rows_of(group)}
        return [padding_of_row[row] for row in sorted(padding_of_row)]

    def of_row(self, row: int) -> tuple[Any, int]:
        """The cache that has a row of the batch, and the row's number there."""
        if not self.is_padded:
            return self.groups[0].cache, row
        group = next(group for group in self.groups if row in self._rows_of(group))
        return group.cache, self._rows_of(group).index(row)

    def extend(self, keys: Tensor, values: Tensor, padding: Sequence[int] | None = None) -> None:
        """Take the next tokens (batch, kv_heads, tokens, dim); `padding` of each row includes theirs."""
        if padding is None:
            if self.is_padded:  # of rows that were cropped before their first token
                self.groups = [RowGroup(0, None, self.make())]
            self.groups[0].cache.extend(keys, values)
            return
        n_seen = self.n_seen
        if not self._examples:
            self._remember(keys, values)
        groups = self.groups
        if n_seen == 0 or any(group.cache.n_seen == 0 for group in groups):
            groups = self._grouped_anew(len(keys), keys.device, padding)
        tokens = []
        for group in groups:
            real = slice(max(0, group.padding - n_seen), None)
            parts = [array.index_select(0, group.rows)[:, :, real] for array in (keys, values)]
            if parts[0].shape[2]:
                tokens.append((group.cache, *parts))
        for cache, *parts in tokens:
            cache.check_new(*parts)
        change(self, "_extend_groups", groups, tokens)

    def _extend_groups(self, groups: list[RowGroup], tokens: list[tuple[Any, Tensor, Tensor]]) -> None:
        for cache, *parts in tokens:
            cache.extend(*parts)
        self.groups = groups

    def _rows_of(self, group: RowGroup) -> list[int]:
        return list(range(self.n_rows)) if group.rows is None else group.rows.tolist()

    def _grouped_anew(self, n_rows: int, device: torch.device, padding: Sequence[int]) -> list[RowGroup]:
        """The groups that have tokens, and for all other rows a new one for each padding."""
        begun = [group for group in self.groups if group.cache.n_seen]
        in_begun = {row for group in begun for row in self._rows_of(group)}
        others = [row for row in range(n_rows) if row not in in_begun]
        rows_of_size = {size: [row for row in others if padding[row] == size] for size in padding}
        new = [RowGroup(size, row_indices(rows, device), self.make()) for size, rows in rows_of_size.items() if rows]
        return begun + new

    def _remember(self, keys: Tensor, values: Tensor) -> None:
        """Device, dtypes and sizes: a batch may begin with nothing but padding."""
        shapes = [(0, array.shape[1], 0, *array.shape[3:]) for array in (keys, values)]
        self._examples = {
            "keys": keys.new_empty(shapes[0]),
            "values": values.new_empty(shapes[1]),
            "counts": keys.new_empty(shapes[0][:3], dtype=torch.int32),
        }

    def cluster(self) -> None:
        for cache in self.caches:
            cache.cluster()

    def observe(self, queries: Tensor) -> None:
        """Let each group see its rows of the `queries` (batch, kv_heads, group, tokens, dim) of the last tokens."""
        if not self.is_padded:
            self.groups[0].cache.observe(queries)
            return
        for group in self.groups:
            real = slice(max(0, queries.shape[-2] - group.cache.n_seen), None)
            rows = queries.index_select(0, group.rows)[..., real, :]
            if rows.shape[-2]:
                group.cache.observe(rows)

    def spread(self, query: Tensor, attend: Callable[[Any, Tensor], Tensor]) -> Tensor:
        """`attend(cache, query)` of each group for its rows of `query` (batch, heads, queries, dim); 0 for padding."""
        if not self.is_padded:
            return attend(self.groups[0].cache, query)
        output = None
        for group in self.groups:
            real = slice(max(0, query.shape[2] - group.cache.n_seen), None)
            rows = query.index_select(0, group.rows)[:, :, real]
            if rows.shape[2]:
                attended = attend(group.cache, rows)
                if output is None:
                    output = attended.new_zeros(*query.shape[:-1], attended.shape[-1])
                output[group.rows, :, real] = attended
        return torch.zeros_like(query) if output is None else output

    def side_by_side(self, width: int, name: str, of: Callable[[Any, str], Tensor] = getattr) -> Tensor:
        """`keys`, `values` or `counts` of all rows, (batch, kv_heads, width, ...): the last entries last, else 0.

        `of` gives those of a cache that holds tokens, of all its KV heads.
        """
        example = self._examples[name]
        joined = example.new_zeros(self.n_rows, example.shape[1], width, *example.shape[3:])
        for group in self.groups:
            if group.cache.n_seen:
                array = of(group.cache, name)
                joined[group.rows, :, width - array.shape[2] :] = array
        return joined

    @property
    def keys(self) -> Tensor | None:
        return self.side_by_side(self.n_stored, "keys") if self.is_padded else self.groups[0].cache.keys

    @property
    def values(self) -> Tensor | None:
        return self.side_by_side(self.n_stored, "values") if self.is_padded else self.groups[0].cache.values

    def select(self, indices: Tensor) -> None:
        """Keep the rows `indices`, in their order; a row may be taken more than once."""
        if not self.is_padded:
            self.groups[0].cache.select(indices)
        else:
            check_rows(indices, self.n_rows)
            change(self, "_select_rows", indices)

    def _select_rows(self, indices: Tensor) -> None:
        groups, wanted = [], indices.tolist()
        for group in self.groups:
            place = {row: number for number, row in enumerate(self._rows_of(group))}
            rows = [number for number, row in enumerate(wanted) if row in place]
            if rows:
                group.cache.select(row_indices([place[wanted[number]] for number in rows], indices.device))
                groups.append(RowGroup(group.padding, row_indices(rows, indices.device), group.cache))
        self.groups = groups

    def crop(self, n_tokens: int) -> None:
        """Remove the last `n_tokens` tokens of all rows."""
        if not self.is_padded:
            self.groups[0].cache.crop(n_tokens)
        else:
            change(self, "_crop_groups", n_tokens)

    def _crop_groups(self, n_tokens: int) -> None:
        for group in self.groups:
            n_real = min(n_tokens, group.cache.n_seen)
            group.cache.crop(n_real)
            group.padding -= n_tokens - n_real

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """For `restore`: without padding the state of the one cache, else that of each group's."""
        if not self.is_padded:
            return self.groups[0].cache.state() if self.n_seen else ({}, {})
        tensors: dict[str, Tensor] = {}
        described = []
        for number, group in enumerate(self.groups):
            group_tensors, numbers = group.cache.state() if group.cache.n_seen else ({}, {})
            tensors |= {f"{number}.{name}": array for name, array in group_tensors.items()}
            described.append({"padding": group.padding, "rows": self._rows_of(group), "numbers": numbers})
        return tensors, {"groups": described}

    def restore(self, tensors: dict[str, Tensor], numbers: dict[str, Any], of: Sizes) -> None:
        """Hold what `state` gave, if it is what such caches can hold; this one must be empty.

        Raises
        ------
        ValueError : see `check_stored` and `check_groups`.
        """
        if "groups" not in numbers:
            check_stored(self.groups[0].cache, tensors, numbers, of)
            self.groups[0].cache.restore(tensors, numbers)
            return
        check_groups(numbers, tensors)
        self.groups = []
        device = next((array.device for array in tensors.values()), torch.device("cpu"))  # there may be padding alone
        for number, described in enumerate(numbers["groups"]):
            prefix = f"{number}."
            group_tensors = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
            cache = self.make()
            check_stored(cache, group_tensors, described["numbers"], of)
            if group_tensors and len(group_tensors["keys"]) != len(described["rows"]):
                rule = f"keys must be of the {len(described['rows'])} rows of group {number}"
                raise ValueError(f"{rule}, got {len(group_tensors['keys'])}")
            cache.restore(group_tensors, described["numbers"])
            if group_tensors:
                self._remember(*cache.like)
            self.groups.append(RowGroup(described["padding"], row_indices(described["rows"], device), cache))
        if len(self.lengths) > 1:
            raise ValueError(f"padding and tokens of each group must be equally many, got {sorted(self.lengths)}")


@on_ordinary_tensors
def row_indices(rows: list[int], device: torch.device) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64, device=device)
