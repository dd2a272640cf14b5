"""Distinctive matching on torch tensors: the reference's decisions, to the bit."""

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from .arguments import check_append, check_integer, check_keep_ratio, entries_of_chunk
from .backends import has_cpp
from .chunk_compression import CompressedChunks, count_members
from .cpu import LANES
from .cpu.distinctive import likeness_to_mean as likeness_by_cpp
from .entry_attention import rows_of
from .exact_mean import certified_mean, sums_are_exact
from .exact_similarity import canonical_similarity, certified_matches
from .merging import Clustering
from .operators import clustering_of_chunks

__all__ = ["compress_distinctive", "distinctive_matching"]

WINDOW = 7  # as in the reference
WORKING_BYTES = 4 * 2**20  # of float64 numbers that are scored together


def distinctive_matching(
    keys: Float[Tensor, "*lead tokens dim"],
    values: Float[Tensor, "*lead tokens dim_value"],
    *,
    keep_ratio: float,
    chunk_size: int = 256,
    n_shared: int = 4,
) -> Clustering:
    """Each chunk of `chunk_size` tokens in `ceil(keep_ratio * chunk_size)` clusters, most of them single tokens.

    Defined, with its errors, by `kvcluster.reference.distinctive_matching`; the same labels and counts, on the device
    of `keys`. Plain torch on every device: there are no kernels of its own.
    """
    check_append(keys, values, None)
    check_keep_ratio(keep_ratio)
    check_integer("chunk_size", chunk_size, least=1)
    check_integer("n_shared", n_shared, least=1)
    *lead, tokens, _ = keys.shape
    target = entries_of_chunk(keep_ratio, chunk_size)
    body = tokens // chunk_size * chunk_size
    if target == chunk_size or body == 0:
        labels = torch.arange(tokens, device=keys.device).expand(*lead, tokens).contiguous()
        return Clustering(labels, torch.ones_like(labels))
    whole = [array[..., :body, :] for array in (keys, values)]
    made = compress_distinctive(*whole, chunk_size=chunk_size, target=target, n_shared=n_shared)
    return Clustering(*clustering_of_chunks(made, lead, body, tokens - body))


def compress_distinctive(
    keys: Float[Tensor, "*lead tokens dim"],
    values: Float[Tensor, "*lead tokens dim_value"],
    *,
    chunk_size: int,
    target: int,
    n_shared: int,
) -> CompressedChunks:
    """As `compress`, by distinctive matching, of whole chunks that become fewer entries than they have tokens."""
    heads = keys.shape[-3] if keys.ndim > 2 else 1
    n_shared = max(1, min(n_shared, target // 2))
    n_exact = target - n_shared
    # (layers, heads, chunks, chunk, dim), where a layer is all that shares its scores
    in_chunks = [
        array.reshape(-1, heads, array.shape[-2] // chunk_size, chunk_size, array.shape[-1]) for array in (keys, values)
    ]
    scores = distinctiveness(*in_chunks)  # (layers, chunks, chunk)
    best_first = scores.argsort(dim=-1, descending=True, stable=True)
    exact, ordinary = best_first[..., :n_exact].sort(dim=-1).values, best_first[..., n_exact:].sort(dim=-1).values
    # from here on the chunks of all heads are one axis
    exact, ordinary = (rows.unsqueeze(1).expand(-1, heads, -1, -1).flatten(0, 2) for rows in (exact, ordinary))
    in_chunks = [array.flatten(0, 2) for array in in_chunks]  # (chunks, chunk, dim)
    rest = [rows_of(array, ordinary) for array in in_chunks]
    destination, is_scored = match_ordinary(rest[0], n_shared)
    labels = torch.empty(len(exact), chunk_size, dtype=torch.int64, device=keys.device)
    labels.scatter_(-1, exact, torch.arange(n_exact, device=keys.device).expand(len(exact), -1))
    labels.scatter_(-1, ordinary, n_exact + destination)
    shared = count_members(destination, n_shared)
    entries = []
    for array, ordinary_rows in zip(in_chunks, rest, strict=True):
        means = certified_mean(ordinary_rows.double(), sums_are_exact(ordinary_rows), destination, shared)
        entries.append(torch.cat([rows_of(array, exact).float(), means], dim=1))
    counts = count_members(labels, target)
    return CompressedChunks(labels, counts, entries[0], entries[1], is_scored.numel(), int(is_scored.sum()))


def match_ordinary(
    keys: Float[Tensor, "chunks tokens dim"], n_shared: int
) -> tuple[Int64[Tensor, "chunks tokens"], Bool[Tensor, "chunks sources"]]:
    """One round: evenly spaced tokens are destinations, all others join the one that is most like them.

    Returns the destination of each token, and which sources needed canonical scores.
    """
    size = keys.shape[1]
    destinations = torch.arange(n_shared, device=keys.device) * size // n_shared
    is_source = torch.ones(size, dtype=torch.bool, device=keys.device).index_fill(0, destinations, False)
    matches = certified_matches(keys[:, is_source].float(), keys[:, destinations].float())
    destination = torch.empty(keys.shape[:2], dtype=torch.int64, device=keys.device)
    destination[:, destinations] = torch.arange(n_shared, device=keys.device)
    destination[:, is_source] = matches.destination
    return destination, matches.is_scored


def distinctiveness(keys: Tensor, values: Tensor) -> Float64[Tensor, "layers chunks chunk"]:
    """Of tokens (layers, heads, chunks, chunk, dim): the heads in their order, then the window in its."""
    heads, size = keys.shape[1], keys.shape[3]
    likeness = [likeness_to_mean(array) for array in (keys, values)]  # (layers, heads, chunks, chunk)
    of_heads = 2.0 - likeness[0] - likeness[1]
    total = torch.zeros_like(of_heads[:, 0])
    for head in range(heads):
        total = total + of_heads[:, head]
    padded = torch.nn.functional.pad(total, (WINDOW // 2, WINDOW // 2))
    inside = torch.nn.functional.pad(torch.ones_like(total[0, 0]), (WINDOW // 2, WINDOW // 2))
    sums, numbers = torch.zeros_like(total), torch.zeros_like(total[0, 0])
    for offset in range(WINDOW):
        sums, numbers = sums + padded[..., offset : offset + size], numbers + inside[offset : offset + size]
    return sums / numbers


def likeness_to_mean(
    array: Float[Tensor, "layers heads chunks chunk dim"],
) -> Float64[Tensor, "layers heads chunks chunk"]:
    """Canonical similarity of each token to the centroid of its chunk."""
    tokens = array.flatten(0, 2)  # (problems, chunk, dim)
    if tokens.device.type == "cpu" and tokens.shape[-1] % LANES == 0 and has_cpp():
        return likeness_by_cpp(tokens.detach()).reshape(array.shape[:-1])
    size = tokens.shape[1]
    labels = torch.zeros(1, size, dtype=torch.int64, device=array.device)
    counts = torch.full((1, 1), size, dtype=torch.int64, device=array.device)
    parts = []
    for part in tokens.split(max(1, WORKING_BYTES // (8 * max(1, tokens[0].numel())))):
        of_all = [x.expand(len(part), -1) for x in (labels, counts)]
        mean = certified_mean(part.double(), sums_are_exact(part), *of_all)  # (problems, 1, dim)
        parts.append(canonical_similarity(part, mean))
    return torch.cat(parts).reshape(array.shape[:-1])
