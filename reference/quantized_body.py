"""A cache whose old entries are quantized: 32 in a row, as soon as there are so many."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from .arguments import check_array, check_half_range
from .quantization import GROUP, check_bits_of_entries, check_n_exact, read_back, within_range
from .recent_queries import CacheWithQueries

__all__ = ["CacheWithBits"]


class CacheWithBits(CacheWithQueries):
    """An `EntryCache` that knows how to quantize; which entries, and when, is the rule of a subclass.

    Parameters
    ----------
    method, n_recent : as in `CacheWithQueries`.
    whole_heads : as in `EntryCache`; none with fewer bits than 16.
    bits : 8, 4, 3 or 2, or a pair of these for keys and for values; 16: nothing is quantized.
    chunk_size : the most tokens that an entry can stand for; below 32,768 with fewer bits, as counts get 16.
    n_sink : entries before all that are quantized.
    n_exact : with fewer bits, last tokens that are not quantized, at most `n_recent`: all others behind the sinks are,
        32 in a row, and a chunk is clustered as they are read back; `chunk_size` is then a multiple of 32. None: recent
        tokens stay exact.

    Attributes
    ----------
    quantized : keys and values (..., entries, dim), float32, and counts of quantized entries as they are read back, see
        `quantization.read_back`: those of the body, then recent tokens. None before the first. They stand between the
        sinks and all other entries.
    n_stored, nbytes : of all entries. `keys`, `values` and `counts` are those of the entries that are not quantized.
    """

    def __init__(
        self,
        method: Any,
        whole_heads: Sequence[int],
        bits: int | tuple[int, int],
        chunk_size: int,
        n_sink: int,
        n_recent: int,
        n_exact: int | None,
    ) -> None:
        super().__init__(method, n_recent, whole_heads)
        self.bits = check_bits_of_entries(bits, chunk_size=chunk_size, whole_heads=whole_heads)
        self.n_exact = check_n_exact(n_exact, bits=self.bits, chunk_size=chunk_size, n_recent=n_recent)
        self.n_sink = n_sink
        self.quantized: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None
        self._n_recent_quantized = 0
        self._nbytes_of_group = 0  # of 32 entries

    @property
    def n_quantized(self) -> int:
        return 0 if self.quantized is None else self.quantized[0].shape[-2]

    @property
    def n_stored(self) -> int:
        return super().n_stored + self.n_quantized

    @property
    def nbytes(self) -> int:
        return super().nbytes + self.n_quantized // GROUP * self._nbytes_of_group

    def append(
        self, keys: np.ndarray, values: np.ndarray, queries: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """As `CacheWithQueries.append`; with `bits`, numbers must be at most half of the largest of float32 in size."""
        if self.bits is not None:
            for name, array in (("keys", keys), ("values", values)):
                check_array(name, array)
                check_half_range(name, array, "to be quantized")
        return super().append(keys, values, queries)

    def entries(self) -> tuple[np.ndarray | None, np.ndarray | None, np.ndarray | None]:
        """Keys, values and counts of all entries in their order; keys and values float32 once some are quantized."""
        keys, values, counts = super().entries()
        if self.quantized is None or keys is None or values is None or counts is None:
            return keys, values, counts
        parts = zip((keys, values, counts), self.quantized, (-2, -2, -1), strict=True)
        keys, values, counts = (put_in(array, self.n_sink, read, axis) for array, read, axis in parts)
        return keys, values, counts

    def _quantize_whole_groups(self, start: int, n: int, *, are_recent: bool = False) -> int:
        """Quantize the entries from `start` on, as many of `n` as are whole groups of 32; how many are left."""
        n_due = 0 if self.bits is None else max(0, n) // GROUP * GROUP
        if self.bits is None or n_due == 0 or self.keys is None or self.values is None or self.counts is None:
            return n
        due = slice(start, start + n_due)
        keys, values, nbytes = read_back(self.keys[..., due, :], self.values[..., due, :], self.bits)
        counts = self.counts[..., due]
        self._nbytes_of_group = (nbytes + 2 * counts.size) // (n_due // GROUP)  # counts in 16 bits
        old = self.quantized or (keys[..., :0, :], values[..., :0, :], counts[..., :0])
        place = self.n_quantized - (0 if are_recent else self._n_recent_quantized)
        new = zip(old, (keys, values, counts), (-2, -2, -1), strict=True)
        keys, values, counts = (put_in(array, place, more, axis) for array, more, axis in new)
        self.quantized = keys, values, counts
        self._n_recent_quantized += n_due if are_recent else 0
        self._replace(due.start, due.stop, keys[..., :0, :], values[..., :0, :], counts[..., :0])
        return n - n_due

    def _quantize_recent(self, start: int, leaving: int) -> None:
        """Quantize the recent tokens, entries from `start` on, that are old enough; read back the first `leaving`."""
        if self.n_exact is None or self.keys is None or self.values is None:
            return
        self._quantize_whole_groups(start, self.keys.shape[-2] - start - self.n_exact, are_recent=True)
        if leaving == 0 or self.quantized is None:
            return
        keys, values, counts = self.quantized
        first = self.n_quantized - self._n_recent_quantized
        read = slice(first, first + leaving)
        read_keys = within_range(keys[..., read, :], self.keys.dtype)
        read_values = within_range(values[..., read, :], self.values.dtype)
        self._replace(start, start, read_keys, read_values, counts[..., read])
        self.quantized = np.delete(keys, read, -2), np.delete(values, read, -2), np.delete(counts, read, -1)
        self._n_recent_quantized -= leaving


def put_in(array: np.ndarray, place: int, part: np.ndarray, axis: int) -> np.ndarray:
    """`array` with `part` before its index `place` along an axis."""
    before, after = np.split(array, (place,), axis=axis)
    return np.concatenate([before, part, after], axis=axis)
