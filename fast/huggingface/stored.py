"""Whether what a file says that a cache holds is what such a cache could hold, before any of it is used.

A file's hashes lie in the file, so whoever makes one makes them right. Compiled code reads where counts and members
tell it to: nothing here is believed because it was written so.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..bounded_cache import BoundedCache
from ..chelsea_cache import ChelseaCache
from ..entry_cache import EntryCache
from ..exact.blocks import BlockLayout, unpack
from ..exact.quantization import GROUP
from ..exact.rows import nbytes_of_row
from ..ragged_cache import RaggedCache
from ..recall_tokens import RecallTokens

__all__ = ["Sizes", "check_groups", "check_stored", "check_window"]

Shape = tuple[int | None, ...]
Dtypes = Sequence[torch.dtype]
FLOATS: Dtypes = (torch.float32, torch.bfloat16, torch.float16)
MOST_TOKENS = 2**31 - 1


class Sizes(NamedTuple):
    """Of the attention of a model: its KV heads, None if it is sharded; query heads of each; features of a key."""

    kv_heads: int | None
    group: int
    dim: int


class Stored:
    """Tensors and numbers of one cache, each asked for once.

    Raises
    ------
    ValueError : what is asked for is missing or another; the field is named.
    """

    def __init__(self, tensors: dict[str, Tensor], numbers: Any) -> None:
        if not isinstance(numbers, dict):
            raise ValueError(f"numbers must be an object, got {numbers!r:.80}")
        self.tensors, self.numbers = dict(tensors), dict(numbers)

    def number(self, name: str, least: int, most: int, default: int | None = None) -> int:
        value = self.numbers.pop(name, default)
        if not is_whole(value) or not least <= value <= most:
            raise ValueError(f"{name} must be a whole number from {least} to {most}, got {value!r:.80}")
        return int(value)

    def tensor(self, name: str, shape: Shape, dtypes: Dtypes = FLOATS, *, is_finite: bool = False) -> Tensor:
        """A tensor of this shape, None for any size. Keys and values are looked through by `restore` anyway."""
        if name not in self.tensors:
            raise ValueError(f"{name} must be there, got {sorted(self.tensors)}")
        array = self.tensors.pop(name)
        if array.dtype not in dtypes:
            raise ValueError(f"{name} must be {' or '.join(map(str, dtypes))}, got {array.dtype}")
        sizes = tuple(array.shape)
        if len(sizes) != len(shape) or any(n not in (None, size) for n, size in zip(shape, sizes, strict=True)):
            raise ValueError(f"{name} must have the shape {shape}, got {sizes}")
        if is_finite and not bool(array.isfinite().all()):
            raise ValueError(f"{name} must be finite")
        return array

    def end(self) -> None:
        """Refuse what nobody asked for."""
        if self.tensors or self.numbers:
            raise ValueError(f"nothing else must be there, got {sorted({**self.tensors, **self.numbers})}")


def check_stored(cache: Any, tensors: dict[str, Tensor], numbers: Any, of: Sizes) -> None:
    """Refuse what an empty cache of `kvcluster.fast` could not hold.

    Parameters
    ----------
    cache : with the parameters that the file names.
    tensors, numbers : for its `restore`.
    of : the sizes of the model's attention.

    Raises
    ------
    ValueError : the first field that is another, named.
    """
    stored = Stored(tensors, numbers)
    if tensors:
        n_seen = stored.number("n_seen", 1, MOST_TOKENS)
        check = next(check for kind, check in CHECKS if isinstance(cache, kind))
        check(cache, stored, n_seen, of)
    stored.end()


def check_entries(cache: Any, stored: Stored, n_seen: int, of: Sizes) -> None:
    """A cache of chunks that are clustered, all heads alike."""
    n_chunks, n_clustered, n_recent_quantized = check_chunks(cache, stored, n_seen)
    n_body = check_spans(cache, stored, n_chunks) * cache._rules.entries
    stored.number("n_body", n_body, n_body, n_body)
    n_quantized = n_recent_quantized + (0 if cache.bits is None else n_body // GROUP * GROUP)
    n_rows = n_seen - n_clustered + n_body - n_quantized
    keys, values, totals = check_even(cache, stored, n_seen, of, n_rows)
    if n_quantized or (cache.bits and "blocks" in stored.tensors):
        totals = totals + check_blocks(cache, stored, keys, values, (n_quantized,) * keys.shape[1])
    check_totals(totals, n_seen)
    if cache._queries is not None:
        check_queries(cache, stored, n_seen, n_clustered, keys.shape[:2], of)


def check_compressed(cache: Any, stored: Stored, n_seen: int, of: Sizes) -> None:
    """A cache that is compressed to a budget: what was left of all tokens at the last time, and those since."""
    cache._n_first = stored.number("n_first", 1, n_seen)
    compressed_at = stored.number("compressed_at", 0, n_seen)
    n_rows = n_seen - compressed_at + (cache.budget if compressed_at else 0)
    check_totals(check_even(cache, stored, n_seen, of, n_rows)[2], n_seen)


def check_ragged(cache: Any, stored: Stored, n_seen: int, of: Sizes) -> None:
    """A cache of heads with ratios of their own, one behind the other."""
    n_chunks, n_clustered, n_recent_quantized = check_chunks(cache, stored, n_seen)
    lengths = cache._lengths(n_seen, n_chunks)
    rows = cache._lengths_of_rows(n_seen, n_chunks, n_recent_quantized)
    if of.kv_heads not in (None, len(lengths)):
        raise ValueError(f"keep_ratios must be one for each of {of.kv_heads} KV heads, got {len(lengths)}")
    keys = stored.tensor("keys", (None, sum(rows), of.dim))
    values = stored.tensor("values", (*keys.shape[:-1], of.dim), [keys.dtype])
    totals = sums_of(check_counts(stored, keys), rows)
    n_quantized = tuple(n - n_rows for n, n_rows in zip(lengths, rows, strict=True))
    if any(n_quantized) or (cache.bits and "blocks" in stored.tensors):
        totals = totals + check_blocks(cache, stored, keys, values, n_quantized)
    check_totals(totals, n_seen)
    if cache._queries is not None:
        check_queries(cache, stored, n_seen, n_clustered, (keys.shape[0], len(lengths)), of)


def check_chunks(cache: Any, stored: Stored, n_seen: int) -> tuple[int, int, int]:
    """Chunks that are clustered after `n_seen` tokens, their tokens, and recent tokens that are quantized."""
    n_chunks = cache._rules.n_chunks(n_seen)
    n_clustered = n_chunks * cache.chunk_size
    stored.number("n_clustered", n_clustered, n_clustered)
    return n_chunks, n_clustered, max(0, cache._rules.n_groups(n_seen) * GROUP - n_clustered)


def check_spans(cache: Any, stored: Stored, n_chunks: int) -> int:
    """Spans of the body: a chunk each without a budget."""
    if not isinstance(cache, BoundedCache):
        return n_chunks
    spans = stored.numbers.pop("spans", None)
    if not isinstance(spans, list) or not all(map(is_whole, spans)) or min(spans, default=1) < 1:
        raise ValueError(f"spans must be a list of whole numbers from 1 on, got {spans!r:.80}")
    if sum(spans) != n_chunks:
        raise ValueError(f"spans must be {n_chunks} chunks together, got {sum(spans)}")
    return len(spans)


def check_even(cache: Any, stored: Stored, n_seen: int, of: Sizes, n_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values and the tokens of each head (rows, heads) in `n_rows` entries, and whole heads beside them."""
    n_heads = None if of.kv_heads is None else of.kv_heads - len(cache.whole_heads)
    keys = stored.tensor("keys", (None, n_heads, n_rows, of.dim))
    values = stored.tensor("values", (*keys.shape[:-1], of.dim), [keys.dtype])
    counts = check_counts(stored, keys)
    if cache.whole_heads:
        whole = keys.shape[0], len(cache.whole_heads), n_seen
        stored.tensor("whole_keys", (*whole, keys.shape[-1]), [keys.dtype])
        stored.tensor("whole_values", (*whole, values.shape[-1]), [keys.dtype])
    return keys, values, counts.sum(dim=-1, dtype=torch.int64)


def check_counts(stored: Stored, keys: Tensor) -> Tensor:
    """The counts of entries like `keys`."""
    counts = stored.tensor("counts", tuple(keys.shape[:-1]), [torch.int32])
    check_least("counts", counts)
    return counts


def check_least(name: str, counts: Tensor) -> None:
    if counts.numel() and int(counts.min()) < 1:
        raise ValueError(f"{name} must be at least 1, got {int(counts.min())}")


def check_blocks(cache: Any, stored: Stored, keys: Tensor, values: Tensor, n_quantized: tuple[int, ...]) -> Tensor:
    """Tokens in the quantized entries of each head, (rows, heads)."""
    layout = BlockLayout(keys.shape[-1], values.shape[-1], cache.bits)
    shape = keys.shape[0], sum(n_quantized) // GROUP, layout.nbytes
    *numbers, counts = unpack(stored.tensor("blocks", shape, [torch.uint8]), layout)
    if not all(bool(array.isfinite().all()) for array in numbers):
        raise ValueError("blocks must have finite scales")
    check_least("counts of blocks", counts)
    return sums_of(counts, n_quantized)


def sums_of(counts: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Sums (rows, heads) of counts (rows, entries) of heads that lie one behind the other."""
    return torch.stack([part.sum(dim=-1, dtype=torch.int64) for part in counts.split(lengths, dim=-1)], dim=-1)


def check_totals(totals: Tensor, n_seen: int) -> None:
    """Every token is in one entry of each head."""
    wrong = totals[totals != n_seen]
    if len(wrong):
        raise ValueError(f"counts must add up to n_seen = {n_seen}, got {int(wrong[0])}")


def check_queries(
    cache: Any, stored: Stored, n_seen: int, n_clustered: int, of_heads: tuple[int, ...], of: Sizes
) -> None:
    """Remembered queries: of every 32nd token that a chunk may yet be matched by."""
    n = max(0, cache._queries.n_sampled(n_seen) - cache._queries.first_needed(n_clustered))
    stored.tensor("queries", (*of_heads, of.group, n, of.dim), is_finite=True)


def check_tokens(cache: Any, stored: Stored, n_seen: int, of: Sizes) -> None:
    """A cache of all tokens and clusters of its body."""
    n_clustered = stored.number("n_clustered", 0, max(0, n_seen - cache.settings.n_sink))
    is_prompt = stored.numbers.pop("is_prompt", None)
    if not isinstance(is_prompt, bool | int) or is_prompt not in (0, 1):
        raise ValueError(f"is_prompt must be true or false, got {is_prompt!r:.80}")
    n_held = n_seen if cache.bits is None else n_seen - n_clustered
    keys = stored.tensor("keys", (None, of.kv_heads, n_held, of.dim))
    values = stored.tensor("values", (*keys.shape[:-1], of.dim), [keys.dtype])
    problems, n_clusters = keys.shape[0] * keys.shape[1], 0
    if n_clustered:
        counts = stored.tensor("counts", (problems, None), [torch.int64])
        n_clusters = counts.shape[1]
        check_partition(counts, stored.tensor("members", (problems, n_clustered), [torch.int64]))
        stored.tensor("features", (problems, n_clusters, 2 * keys.shape[-1]), [torch.bfloat16], is_finite=True)
        if cache.settings.centroids_for_rest:
            stored.tensor("value_centroids", (problems, n_clusters, values.shape[-1]), [torch.float32], is_finite=True)
    if n_clustered and cache.bits is not None:
        for name, array, bits in zip(("packed_keys", "packed_values"), (keys, values), cache.bits, strict=True):
            stored.tensor(name, (problems, n_clustered, nbytes_of_row(array.shape[-1], bits)), [torch.uint8])
    n_before = stored.number("n_clustered_before", 0, n_clustered, n_clustered)
    clusters_before = stored.number("n_clusters_before", 0, n_clusters, n_clusters)
    if n_clustered and bool((counts[:, :clusters_before].sum(dim=-1) != n_before).any()):
        raise ValueError(f"n_clusters_before must be the clusters of {n_before} tokens, got {clusters_before}")


def check_partition(counts: Tensor, members: Tensor) -> None:
    """Clusters without a token are allowed; every token is in one."""
    n_tokens = members.shape[1]
    if counts.numel() and (int(counts.min()) < 0 or int(counts.max()) > n_tokens):
        raise ValueError(f"counts must be from 0 to {n_tokens}, got {int(counts.min())} to {int(counts.max())}")
    if bool((counts.sum(dim=-1) != n_tokens).any()):
        raise ValueError(f"counts must add up to {n_tokens} clustered tokens, got {int(counts.sum(dim=-1)[0])}")
    if not bool((members.sort(dim=-1).values == torch.arange(n_tokens, device=members.device)).all()):
        raise ValueError(f"members must be each of {n_tokens} tokens once")


def check_window(layer: Any, tensors: dict[str, Tensor], numbers: Any, of: Sizes) -> None:
    """Refuse what a layer of transformers with a sliding window could not hold."""
    stored = Stored(tensors, numbers)
    if tensors:
        n_seen = stored.number("n_seen", 1, MOST_TOKENS)
        keys = stored.tensor("keys", (None, of.kv_heads, min(n_seen, layer.sliding_window - 1), of.dim), is_finite=True)
        stored.tensor("values", (*keys.shape[:-1], of.dim), [keys.dtype], is_finite=True)
    stored.end()


CHECKS: tuple[tuple[type, Callable[..., None]], ...] = (
    (RecallTokens, check_tokens),
    (RaggedCache, check_ragged),
    (ChelseaCache, check_compressed),
    (EntryCache, check_entries),
)


def check_groups(numbers: dict[str, Any], names: Iterable[str]) -> None:
    """Refuse groups of rows that are no batch with padding, each row once.

    Raises
    ------
    ValueError : another description, or tensors of a group that there is not.
    """
    groups = numbers["groups"]
    if set(numbers) != {"groups"}:
        raise ValueError(f"nothing must be beside groups, got {sorted(numbers)}")
    if not isinstance(groups, list) or not groups or not all(isinstance(group, dict) for group in groups):
        raise ValueError(f"groups must be a list of objects, got {groups!r:.80}")
    for group in groups:
        if set(group) != {"padding", "rows", "numbers"}:
            raise ValueError(f"groups must have padding, rows and numbers, got {sorted(group)}")
        if not is_whole(group["padding"]) or not 0 <= group["padding"] <= MOST_TOKENS:
            raise ValueError(f"padding must be a whole number from 0 on, got {group['padding']!r:.80}")
        if not isinstance(group["rows"], list) or not group["rows"] or not all(map(is_whole, group["rows"])):
            raise ValueError(f"rows must be a list of whole numbers, got {group['rows']!r:.80}")
    rows = sorted(itertools.chain(*(group["rows"] for group in groups)))
    if rows != list(range(len(rows))):
        raise ValueError(f"rows must be each row of a batch once, got {rows!r:.80}")
    known = {str(number) for number in range(len(groups))}
    if unknown := sorted(name for name in names if name.partition(".")[0] not in known):
        raise ValueError(f"tensors must be of the {len(groups)} groups, got {unknown[0]}")


def is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
