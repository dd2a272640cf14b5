"""What every clustered cache holds: entries of the heads that are clustered, every token of heads that stay whole."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Float64, Int32

from .arguments import check_append, check_heads, check_whole_heads
from .clustered_attention import clustered_attention
from .whole_changes import whole_or_not
from .whole_heads import apart, together

__all__ = ["EntryCache"]


class EntryCache:
    """Keys, values and counts of a layer, before any rule of what is clustered; `ClusteredCache` is one with a rule.

    Parameters
    ----------
    whole_heads : KV heads that keep every token, as indices of the last leading axis. All others are clustered, each
        to the same number of entries.

    Attributes
    ----------
    keys, values : (..., n_stored, dim) and (..., n_stored, dim_value), in the dtype that was appended; None at first.
        With whole heads, of the other heads only.
    counts : (..., n_stored), int32: tokens per entry; None at first.
    whole_keys, whole_values : (..., whole_heads, n_seen, dim), every token of the whole heads; None without any.
    n_seen : tokens appended so far: the position of the next token.
    n_stored : entries held of a head that is clustered.
    nbytes : bytes of keys, values and counts, those of whole heads, which need no counts, included.
    """

    def __init__(self, whole_heads: Sequence[int] = ()) -> None:
        self.whole_heads = check_whole_heads(whole_heads)
        self.keys: Float[np.ndarray, "*lead entries dim"] | None = None
        self.values: Float[np.ndarray, "*lead entries dim_value"] | None = None
        self.counts: Int32[np.ndarray, "*lead entries"] | None = None
        self.whole_keys: Float[np.ndarray, "*lead tokens dim"] | None = None
        self.whole_values: Float[np.ndarray, "*lead tokens dim_value"] | None = None
        self.n_seen = 0

    @property
    def n_stored(self) -> int:
        return 0 if self.keys is None else self.keys.shape[-2]

    @property
    def nbytes(self) -> int:
        arrays = (self.keys, self.values, self.counts, self.whole_keys, self.whole_values)
        return sum(array.nbytes for array in arrays if array is not None)

    @whole_or_not
    def append(
        self, keys: Float[np.ndarray, "*lead tokens dim"], values: Float[np.ndarray, "*lead tokens dim_value"]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Take the next tokens, then cluster what is due.

        Parameters
        ----------
        keys, values : (..., tokens, dim) and (..., tokens, dim_value), any number of tokens; leading axes, dims and
            dtype as in the first append.

        Returns
        -------
        keys, values, counts : the entries just before this clustering, the new tokens last, of all heads as in
            `entries`. A model lets the new tokens attend to these, so a prompt given at once is attended to exactly. Do
            not write to them: they may be the cache's own arrays.

        Raises
        ------
        ValueError : wrong dtype or shape, NaN or infinity. The cache is then as it was.
        """
        check_append(keys, values, EntryCache.entries(self)[:2])
        check_heads(self.whole_heads, keys.shape)
        if self.keys is None:
            self.keys, self.values = keys[..., :0, :], values[..., :0, :]
            if self.whole_heads:
                self.keys, self.whole_keys = apart(self.keys, self.whole_heads)
                self.values, self.whole_values = apart(self.values, self.whole_heads)
            self.counts = np.empty((*self.keys.shape[:-2], 0), dtype=np.int32)
        n_new = keys.shape[-2]
        if self.whole_heads:
            (keys, whole_keys), (values, whole_values) = (apart(array, self.whole_heads) for array in (keys, values))
            self.whole_keys = np.concatenate([self.whole_keys, whole_keys], axis=-2)
            self.whole_values = np.concatenate([self.whole_values, whole_values], axis=-2)
        self.keys, self.values, self.counts = self._with(keys, values)
        self.n_seen += n_new
        seen = self.entries()
        self._cluster_what_is_due()
        return seen

    def attend(
        self, query: Float[np.ndarray, "*lead queries dim"], *, scale: float | None = None
    ) -> Float64[np.ndarray, "*lead queries dim_value"]:
        """Clustered attention of `query` (..., queries, dim) to all stored entries.

        Raises
        ------
        ValueError : nothing appended yet; else as `clustered_attention`.
        """
        if self.keys is None:
            raise ValueError("attend needs at least one appended token, got an empty cache")
        return clustered_attention(query, *self.entries(), scale=scale)

    def entries(self) -> tuple[np.ndarray | None, np.ndarray | None, np.ndarray | None]:
        """Keys, values, counts of all heads in their order, see `whole_heads.together`; None before the first."""
        if self.whole_keys is None:
            return self.keys, self.values, self.counts
        stored = self.keys, self.values, self.counts
        return together(*stored, self.whole_keys, self.whole_values, self.whole_heads)

    def _cluster_what_is_due(self) -> None:
        """Cluster by the rule of a subclass; there is none here."""

    def _with(self, keys: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What is stored of the heads that are clustered, followed by these tokens."""
        counts = np.ones(keys.shape[:-1], dtype=np.int32)
        return (
            np.concatenate([self.keys, keys], axis=-2),  # (..., entries, dim)
            np.concatenate([self.values, values], axis=-2),
            np.concatenate([self.counts, counts], axis=-1),
        )

    def _replace(self, start: int, stop: int, keys: np.ndarray, values: np.ndarray, counts: np.ndarray) -> None:
        """Put these entries, rounded to the cache's dtypes, in the place of those from `start` to `stop`."""
        for name, new, axis in (("keys", keys, -2), ("values", values, -2), ("counts", counts, -1)):
            before, _, after = np.split(getattr(self, name), (start, stop), axis=axis)
            setattr(self, name, np.concatenate([before, new.astype(before.dtype), after], axis=axis))
