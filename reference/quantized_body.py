"""A cache whose old entries are quantized: 32 in a row, as soon as there are so many."""

from collections.abc import Sequence

import numpy as np

from .arguments import check_array, check_half_range
from .entry_cache import EntryCache
from .quantization import GROUP, check_bits_of_entries, read_back

__all__ = ["CacheWithBits"]


class CacheWithBits(EntryCache):
    """An `EntryCache` that knows how to quantize; which entries, and when, is the rule of a subclass.

    Parameters
    ----------
    whole_heads : as in `EntryCache`; none with fewer bits than 16.
    bits : 8, 4, 3 or 2, or a pair of these for keys and for values; 16: nothing is quantized.
    chunk_size : the most tokens that an entry can stand for; below 32,768 with fewer bits, as counts get 16.

    Attributes
    ----------
    quantized : keys and values (..., entries, dim), float32, and counts of quantized entries as they are read back, see
        `quantization.read_back`; None before the first. They stand between the sinks and all other entries.
    n_stored, nbytes : of all entries. `keys`, `values` and `counts` are those of the entries that are not quantized.
    """

    def __init__(self, whole_heads: Sequence[int], bits: int | tuple[int, int], chunk_size: int) -> None:
        super().__init__(whole_heads)
        self.bits = check_bits_of_entries(bits, chunk_size=chunk_size, whole_heads=whole_heads)
        self.quantized: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None
        self._place = 0  # of the quantized entries among the others
        self._nbytes_quantized = 0

    @property
    def n_stored(self) -> int:
        return super().n_stored + (0 if self.quantized is None else self.quantized[0].shape[-2])

    @property
    def nbytes(self) -> int:
        return super().nbytes + self._nbytes_quantized

    def append(self, keys: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """As `EntryCache.append`; with `bits`, numbers must be at most half of the largest float32 number in size."""
        if self.bits is not None:
            for name, array in (("keys", keys), ("values", values)):
                check_array(name, array)
                check_half_range(name, array, "to be quantized")
        return super().append(keys, values)

    def entries(self) -> tuple[np.ndarray | None, np.ndarray | None, np.ndarray | None]:
        """Keys, values and counts of all entries in their order; keys and values float32 once some are quantized."""
        keys, values, counts = super().entries()
        if self.quantized is None or keys is None or values is None or counts is None:
            return keys, values, counts
        parts = zip((keys, values, counts), self.quantized, (-2, -2, -1), strict=True)
        keys, values, counts = (put_in(array, self._place, read, axis) for array, read, axis in parts)
        return keys, values, counts

    def _quantize_whole_groups(self, start: int, n: int) -> int:
        """Quantize the entries from `start` on, as many of `n` as are whole groups of 32; how many are left."""
        n_due = 0 if self.bits is None else n // GROUP * GROUP
        if self.bits is None or n_due == 0 or self.keys is None or self.values is None or self.counts is None:
            return n
        due = slice(start, start + n_due)
        keys, values, nbytes = read_back(self.keys[..., due, :], self.values[..., due, :], self.bits)
        new = keys, values, self.counts[..., due]
        self._nbytes_quantized += nbytes + 2 * new[2].size  # of counts in 16 bits
        if self.quantized is not None:
            pairs = zip(self.quantized, new, (-2, -2, -1), strict=True)
            keys, values, counts = (np.concatenate([old, added], axis=axis) for old, added, axis in pairs)
            new = keys, values, counts
        self.quantized, self._place = new, start
        self._replace(due.start, due.stop, keys[..., :0, :], values[..., :0, :], new[2][..., :0])
        return n - n_due


def put_in(array: np.ndarray, place: int, part: np.ndarray, axis: int) -> np.ndarray:
    """`array` with `part` before its index `place` along an axis."""
    before, after = np.split(array, (place,), axis=axis)
    return np.concatenate([before, part, after], axis=axis)
