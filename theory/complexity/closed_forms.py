"""Closed forms of what every algorithm of the reference costs: README.md, claims C1 to C8."""

import itertools

from kvcluster.reference.chunks import entries_of_chunk

from .counting import Operations

__all__ = [
    "attention_bytes",
    "attention_operations",
    "break_even",
    "compression_operations",
    "entries_after",
    "kmeans_bytes",
    "kmeans_operations",
    "matching_bytes",
    "matching_operations",
    "merge_operations",
    "pooled_bytes",
    "pooled_operations",
    "round_sizes",
    "similarity_operations",
]

ROWS_TOGETHER = 128  # tokens whose similarities `reference.kmeans` computes together


def padded(dim: int) -> int:
    """The power of two that a halving sum pads to."""
    return 1 << max(0, dim - 1).bit_length()


def similarity_operations(m: int, n: int, dim: int) -> Operations:
    """All pairs of m rows with n rows."""
    return Operations(
        multiplications=m * n * (dim + 2) + (m + n) * dim,
        additions=(m * n + m + n) * (padded(dim) - 1),
        divisions=m * n,
        comparisons=m * n,
    )


def merge_operations(tokens: int, entries: int, dim: int) -> Operations:
    """Means of all clusters."""
    return Operations(additions=tokens * dim, divisions=entries * dim)


def round_sizes(chunk_size: int, target: int) -> list[int]:
    """Entries of a chunk before its first round, before its second, ..., after its last."""
    rounds = (-(-chunk_size // target) - 1).bit_length()  # the least r with chunk_size <= target 2^r
    return [max(target, -(-chunk_size // 2**done)) for done in range(rounds + 1)]


def matching_operations(tokens: int, dim: int, *, keep_ratio: float, chunk_size: int, problems: int = 1) -> Operations:
    """Chunked soft matching; un-chunked bipartite matching is `chunk_size = tokens`."""
    per_chunk = Operations()
    for size in round_sizes(chunk_size, entries_of_chunk(keep_ratio, chunk_size))[:-1]:
        sources, destinations = -(-size // 2), size // 2
        per_chunk += merge_operations(chunk_size, size, dim) + similarity_operations(sources, destinations, dim)
        per_chunk += Operations(comparisons=2 * sources * (destinations - 1), sorted=sources)
    return per_chunk * (tokens // chunk_size * problems)


def matching_bytes(
    tokens: int, dim: int, *, keep_ratio: float, chunk_size: int, problems: int = 1, itemsize: int = 4
) -> int:
    """Keys in, labels and counts (int64) out."""
    return problems * (tokens * dim * itemsize + 8 * (tokens + entries_after(tokens, keep_ratio, chunk_size)))


def chunks_of(entries: int, chunk_size: int) -> list[int]:
    """Entries of each chunk in which pooled matching compares: a last one may be shorter, one alone is none.

    >>> chunks_of(9, 4), chunks_of(10, 4)
    ([4, 4], [4, 4, 2])
    """
    whole, rest = divmod(entries, chunk_size)
    return [chunk_size] * whole + [rest] * (rest >= 2)


def pooled_operations(
    entries: int, dim: int, dim_value: int, *, target: int, chunk_size: int, problems: int = 1
) -> Operations:
    """Pooled matching from `entries` to `target`, at least 1, weighted means of keys and values included."""
    sizes = round_sizes(entries, target) if entries > target else [entries]
    operations = Operations()
    for before, after in itertools.pairwise(sizes):
        for size in chunks_of(before, chunk_size):
            sources, destinations = -(-size // 2), size // 2
            operations += similarity_operations(sources, destinations, dim)
            operations += Operations(comparisons=2 * sources * (destinations - 1), sorted=sources)
        operations += merge_operations(before, after, dim + dim_value)
        operations += Operations(multiplications=before * (dim + dim_value))  # by counts
    return operations * problems


def pooled_bytes(entries: int, dim: int, dim_value: int, *, target: int, problems: int = 1, itemsize: int = 4) -> int:
    """Keys, values and counts (int32) in; keys and values in float32, and counts, out."""
    left = min(entries, target)
    return problems * (entries * ((dim + dim_value) * itemsize + 4) + left * ((dim + dim_value) * 4 + 4))


def kmeans_operations(
    tokens: int, dim: int, *, n_clusters: int, assignments: int, updates: int, problems: int = 1
) -> Operations:
    """k-means that assigned `assignments` times and updated `updates` times (one less where labels repeated)."""
    assign = Operations(comparisons=tokens * (n_clusters - 1))
    for first in range(0, tokens, ROWS_TOGETHER):
        assign += similarity_operations(min(ROWS_TOGETHER, tokens - first), n_clusters, dim)
    return (assign * assignments + merge_operations(tokens, n_clusters, dim) * updates) * problems


def kmeans_bytes(tokens: int, dim: int, *, n_clusters: int, problems: int = 1, itemsize: int = 4) -> int:
    """Keys in; labels, counts (int64) and centroids (float32) out."""
    return problems * (tokens * dim * itemsize + 8 * (tokens + n_clusters) + 4 * n_clusters * dim)


def attention_operations(
    queries: int, entries: int, dim: int, dim_value: int, *, is_clustered: bool = False, problems: int = 1
) -> Operations:
    """Attention of `queries` to `entries`; a clustered one adds log counts."""
    operations = Operations(
        multiplications=queries * entries * (dim + 1 + dim_value),
        additions=queries * (entries * (dim - 1) + entries + (entries - 1) + (entries - 1) * dim_value),
        divisions=queries * entries,
        comparisons=queries * (entries - 1),
        exponentials=queries * entries,
    )
    if is_clustered:
        operations += Operations(additions=queries * entries, exponentials=entries)
    return operations * problems


def attention_bytes(
    queries: int,
    entries: int,
    dim: int,
    dim_value: int,
    *,
    bytes_of_count: int = 0,
    problems: int = 1,
    itemsize: int = 4,
) -> int:
    """Query, keys, values and counts in, output (float64) out."""
    cache = entries * ((dim + dim_value) * itemsize + bytes_of_count)
    return problems * (cache + queries * (dim * itemsize + dim_value * 8))


def compression_operations(tokens: int, dim: int, dim_value: int, *, keep_ratio: float, chunk_size: int) -> Operations:
    """Matching the keys of one KV head, then averaging keys and values."""
    entries = entries_after(tokens, keep_ratio, chunk_size)
    matching = matching_operations(tokens, dim, keep_ratio=keep_ratio, chunk_size=chunk_size)
    return matching + merge_operations(tokens, entries, dim + dim_value)


def entries_after(tokens: int, keep_ratio: float, chunk_size: int) -> int:
    """Entries that `tokens` become."""
    chunks, n_trailing = divmod(tokens, chunk_size)
    return chunks * entries_of_chunk(keep_ratio, chunk_size) + n_trailing


def break_even(tokens: int, dim: int, *, group: int, keep_ratio: float, chunk_size: int) -> int:
    """Generated tokens after which compressing the prompt has saved as many multiplications as it took.

    For one KV head with `group` query heads, whole chunks, and a keep ratio below 1.
    """
    spent = compression_operations(tokens, dim, dim, keep_ratio=keep_ratio, chunk_size=chunk_size).multiplications
    saved = group * (tokens - entries_after(tokens, keep_ratio, chunk_size)) * (2 * dim + 1)
    return -(-spent // saved)
