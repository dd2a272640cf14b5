"""A simple record of what a cache of a model was given.

The tokens, and the keys and values that each layer made of them, piece by piece: `crop` shortens it, rows are picked
from it, and a saved file has a copy of it.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["Piece", "Record"]

Piece = tuple[Tensor, ...]


@dataclass
class Record:
    """What a cache has been given: tokens (batch, n), how many of each row are padding, and the pieces of each layer.

    A piece is keys, values and, where a layer asks for them, queries.
    """

    tokens: Tensor
    padding: Tensor
    pieces: list[list[Piece]] = field(default_factory=list)

    @property
    def n_seen(self) -> int:
        return self.tokens.shape[1]

    def mask(self, n_new: int) -> Tensor:
        return (torch.arange(self.n_seen + n_new) >= self.padding[:, None]).long()

    def with_more(self, tokens: Tensor, pieces: list[list[Piece]]) -> "Record":
        old = self.pieces or [[] for _ in pieces]
        together = [a + b for a, b in zip(old, pieces, strict=True)]
        return Record(torch.cat([self.tokens, tokens], dim=1), self.padding, together)

    def cropped(self, n: int) -> "Record":
        pieces = [list(layer) for layer in self.pieces]
        for layer in pieces:
            left = n
            while left > 0:
                last = layer.pop()
                size = last[0].shape[-2]
                if size > left:
                    layer.append(tuple(array[..., : size - left, :] for array in last))
                left -= min(size, left)
        return Record(self.tokens[:, : self.n_seen - n], self.padding, pieces)

    def of_rows(self, rows: Tensor) -> "Record":
        pieces = [[tuple(array[rows] for array in piece) for piece in layer] for layer in self.pieces]
        return Record(self.tokens[rows], self.padding[rows], pieces)
