"""The body of a recall cache in few bits: of each token a row of bytes for its key, and one for its value."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from ..backends import implementation
from ..exact.quantization import within_range
from ..exact.rows import nbytes_of_row
from .ordinary import on_ordinary_tensors
from .room import move_to_room, with_room

__all__ = ["PackedTokens", "as_read_back", "packed_rows", "read_rows"]

LEAST_ROOM = 320  # tokens


class PackedTokens:
    """Tokens in the order of the clusters.

    Parameters
    ----------
    like : keys and values (problems, tokens, .) of the cache.
    bits : of keys and of values.
    allocate : memory of a shape, uint8.

    Attributes
    ----------
    rows : bytes of keys and of values (problems, room, nbytes), of which the first `n_tokens` are there.
    """

    def __init__(
        self, like: tuple[Tensor, ...], bits: tuple[int, int], allocate: Callable[[tuple[int, ...]], Tensor]
    ) -> None:
        self.bits, self.n_tokens = bits, 0
        self.dims, self.dtypes = tuple(x.shape[-1] for x in like), tuple(x.dtype for x in like)
        self._allocate = allocate
        sizes = zip(self.dims, bits, strict=True)
        self.rows = tuple(allocate((len(like[0]), 0, nbytes_of_row(dim, of))) for dim, of in sizes)

    @property
    def nbytes_of_token(self) -> int:
        """Bytes of a key and a value."""
        return sum(rows.shape[-1] for rows in self.rows)

    @property
    def nbytes(self) -> int:
        return len(self.rows[0]) * self.n_tokens * self.nbytes_of_token

    @property
    def nbytes_reserved(self) -> int:
        """Bytes of memory held, with room to grow."""
        return sum(rows.nbytes for rows in self.rows)

    def packed(self, tokens: tuple[Float[Tensor, "problems tokens dim"], ...]) -> tuple[Tensor, ...]:
        """Rows of keys and values, not held yet."""
        return tuple(packed_rows(x, bits) for x, bits in zip(tokens, self.bits, strict=True))

    def read(self, rows: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Keys and values as rows are read back, in the dtypes of the cache."""
        return tuple(read_rows(*of) for of in zip(rows, self.dims, self.dtypes, strict=True))

    def add(self, rows: tuple[Tensor, ...]) -> None:
        """Hold these rows behind the others."""
        n_tokens = self.n_tokens + rows[0].shape[1]
        if n_tokens > self.rows[0].shape[1]:
            room = with_room(n_tokens, least=min(rows[0].shape[1], LEAST_ROOM))
            self.rows = move_to_room(self.rows, self.n_tokens, rows, room, lambda shape, _: self._allocate(shape))
        for held, new in zip(self.rows, rows, strict=True):
            held[:, self.n_tokens : n_tokens] = new
        self.n_tokens = n_tokens

    def held(self) -> tuple[Tensor, ...]:
        """The rows of all tokens."""
        return tuple(rows[:, : self.n_tokens] for rows in self.rows)

    @on_ordinary_tensors
    def select_rows(self, indices: Int64[Tensor, " problems"]) -> None:
        """Keep the problems `indices`, in their order."""
        moved = tuple(self._allocate((len(indices), *rows.shape[1:])) for rows in self.rows)
        for new, old in zip(moved, self.rows, strict=True):
            torch.index_select(old, 0, indices.to(old.device), out=new)
        self.rows = moved


def packed_rows(array: Float[Tensor, "*lead numbers"], bits: int) -> UInt8[Tensor, "*lead nbytes"]:
    """Rows of `array` in few bits."""
    rows: Tensor = implementation("pack_rows", "auto", array, array)(array, bits)
    return rows


def read_rows(
    rows: UInt8[Tensor, "*lead nbytes"], n_numbers: int, dtype: torch.dtype
) -> Float[Tensor, "*lead numbers"]:
    """What rows are read back as, rounded to `dtype`."""
    like = torch.empty(0, n_numbers, dtype=dtype, device=rows.device)
    return within_range(implementation("unpack_rows", "auto", like, like)(rows, n_numbers), dtype)


def as_read_back(array: Float[Tensor, "*lead numbers"], bits: int) -> Float[Tensor, "*lead numbers"]:
    """`array` as its rows are read back, in its dtype."""
    return read_rows(packed_rows(array, bits), array.shape[-1], array.dtype)
