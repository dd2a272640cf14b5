"""Distinctive matching on torch tensors: the reference's decisions, to the bit."""

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from .arguments import check_append, check_integer, check_keep_ratio, entries_of_chunk, with_four_axes
from .backends import Backend, choose_backend, has_cpp
from .chunk_compression import CompressedChunks, compress, count_members
from .cpu import LANES
from .cpu.distinctive import likeness_to_mean as likeness_by_cpp
from .entry_attention import rows_of
from .exact_mean import certified_mean, sums_are_exact
from .exact_similarity import canonical_similarity, certified_matches
from .merging import Clustering
from .operators import clustering_of_chunks

__all__ = [
    "compress_by_method",
    "compress_distinctive",
    "distinctive_matching",
    "distinctiveness",
    "evenly_spaced",
    "labels_of",
    "split_by_score",
]

WINDOW = 7  # as in the reference
WORKING_BYTES = 4 * 2**20  # of float64 numbers that are scored together


def distinctive_matching(
    keys: Float[Tensor, "*lead tokens dim"],
    values: Float[Tensor, "*lead tokens dim_value"],
    *,
    keep_ratio: float,
    chunk_size: int = 256,
    n_shared: int = 4,
    backend: Backend = "auto",
) -> Clustering:
    """Each chunk of `chunk_size` tokens in `ceil(keep_ratio * chunk_size)` clusters, most of them single tokens.

    Defined, with its errors, by `kvcluster.reference.distinctive_matching`; the same labels and counts, on the device
    of `keys`. `backend` as in `choose_backend`.
    """
    check_append(keys, values, None)
    check_keep_ratio(keep_ratio)
    check_integer("chunk_size", chunk_size, least=1)
    check_integer("n_shared", n_shared, least=1)
    choose_backend(backend, keys, values)
    *lead, tokens, _ = keys.shape
    target = entries_of_chunk(keep_ratio, chunk_size)
    body = tokens // chunk_size * chunk_size
    if target == chunk_size or body == 0:
        labels = torch.arange(tokens, device=keys.device).expand(*lead, tokens).contiguous()
        return Clustering(labels, torch.ones_like(labels))
    whole = [array[..., :body, :].detach() for array in (keys, values)]
    made = compress_distinctive(*whole, chunk_size=chunk_size, target=target, n_shared=n_shared, backend=backend)
    return Clustering(*clustering_of_chunks(made, lead, body, tokens - body))


def compress_by_method(
    keys: Float[Tensor, "*lead tokens dim"],
    values: Float[Tensor, "*lead tokens dim_value"],
    *,
    chunk_size: int,
    target: int,
    n_shared: int | None,
    backend: Backend = "auto",
) -> CompressedChunks:
    """`compress_distinctive` with `n_shared` shared entries; without them `compress`, the published method."""
    if n_shared is None:
        return compress(keys, values, chunk_size=chunk_size, target=target, backend=backend)
    return compress_distinctive(keys, values, chunk_size=chunk_size, target=target, n_shared=n_shared, backend=backend)


def compress_distinctive(
    keys: Float[Tensor, "*lead tokens dim"],
    values: Float[Tensor, "*lead tokens dim_value"],
    *,
    chunk_size: int,
    target: int,
    n_shared: int,
    backend: str = "auto",
) -> CompressedChunks:
    """As `compress`, by distinctive matching, of whole chunks that become fewer entries than they have tokens."""
    heads = keys.shape[-3] if keys.ndim > 2 else 1  # of a layer, which is all that shares its scores
    of_layers = (keys.shape[:-3].numel(), heads, keys.shape[-2] // chunk_size, chunk_size)
    n_shared = max(1, min(n_shared, target // 2))
    n_exact = target - n_shared
    if choose_backend(backend, keys, values) == "triton":
        from .kernels.distinctive import compress_distinctive as compress_by_kernels

        four_axes = with_four_axes(keys), with_four_axes(values)
        return compress_by_kernels(*four_axes, of_layers, n_exact, n_shared)

    in_chunks = [array.reshape(-1, chunk_size, array.shape[-1]) for array in (keys, values)]  # (chunks, chunk, dim)
    scores = distinctiveness(*(likeness_to_mean(array).reshape(of_layers) for array in in_chunks))
    exact, ordinary = split_by_score(scores, heads, n_exact)  # (chunks, n_exact), (chunks, the others)
    rest = [rows_of(array, ordinary) for array in in_chunks]
    destination, is_scored = match_ordinary(rest[0], n_shared)
    labels = labels_of(exact, ordinary, destination)
    shared = count_members(destination, n_shared)
    entries = []
    for array, ordinary_rows in zip(in_chunks, rest, strict=True):
        means = certified_mean(ordinary_rows.double(), sums_are_exact(ordinary_rows), destination, shared)
        entries.append(torch.cat([rows_of(array, exact).float(), means], dim=1))
    counts = count_members(labels, target)
    return CompressedChunks(labels, counts, entries[0], entries[1], is_scored.numel(), int(is_scored.sum()))


def split_by_score(scores: Float64[Tensor, "layers chunks chunk"], heads: int, n_exact: int) -> tuple[Tensor, Tensor]:
    """Places of the `n_exact` tokens of highest score, of ties the first, and of the others, both ascending.

    (layers * heads * chunks, tokens): all heads of a layer have the same.
    """
    best_first = scores.argsort(dim=-1, descending=True, stable=True)
    exact, ordinary = best_first[..., :n_exact].sort(dim=-1).values, best_first[..., n_exact:].sort(dim=-1).values
    exact, ordinary = (rows.unsqueeze(1).expand(-1, heads, -1, -1).flatten(0, 2) for rows in (exact, ordinary))
    return exact, ordinary


def labels_of(
    exact: Int64[Tensor, "chunks exact"],
    ordinary: Int64[Tensor, "chunks ordinary"],
    destination: Int64[Tensor, "chunks ordinary"],
) -> Int64[Tensor, "chunks chunk"]:
    """Entry of each token: first the exact ones, then those that the ordinary ones share."""
    chunks, n_exact = exact.shape
    labels = torch.empty(chunks, n_exact + ordinary.shape[1], dtype=torch.int64, device=exact.device)
    labels.scatter_(-1, exact, torch.arange(n_exact, device=exact.device).expand(chunks, -1))
    return labels.scatter_(-1, ordinary, n_exact + destination)


def evenly_spaced(n_shared: int, size: int, device: torch.device) -> Int64[Tensor, " n_shared"]:
    """Which of `size` ordinary tokens are destinations: the first among them."""
    return torch.arange(n_shared, device=device) * size // n_shared


def match_ordinary(
    keys: Float[Tensor, "chunks tokens dim"], n_shared: int
) -> tuple[Int64[Tensor, "chunks tokens"], Bool[Tensor, "chunks sources"]]:
    """One round: evenly spaced tokens are destinations, all others join the one that is most like them.

    Returns the destination of each token, and which sources needed canonical scores.
    """
    size = keys.shape[1]
    destinations = evenly_spaced(n_shared, size, keys.device)
    is_source = torch.ones(size, dtype=torch.bool, device=keys.device).index_fill(0, destinations, False)
    matches = certified_matches(keys[:, is_source].float(), keys[:, destinations].float())
    destination = torch.empty(keys.shape[:2], dtype=torch.int64, device=keys.device)
    destination[:, destinations] = torch.arange(n_shared, device=keys.device)
    destination[:, is_source] = matches.destination
    return destination, matches.is_scored


def distinctiveness(
    keys: Float64[Tensor, "layers heads chunks chunk"], values: Float64[Tensor, "layers heads chunks chunk"]
) -> Float64[Tensor, "layers chunks chunk"]:
    """Of the likeness of each token's key and value to their means: the heads in their order, then the window in its.

    Additions, and one division, of elements: the same bits on every device.
    """
    layers, _, chunks, size = keys.shape
    total = keys.new_zeros(layers, chunks, size)
    for of_head in (2.0 - keys - values).unbind(dim=1):
        total = total + of_head
    padded = torch.nn.functional.pad(total, (WINDOW // 2, WINDOW // 2))
    inside = torch.nn.functional.pad(torch.ones(size, dtype=total.dtype, device=total.device), (WINDOW // 2,) * 2)
    sums, numbers = torch.zeros_like(total), torch.zeros_like(inside[:size])
    for offset in range(WINDOW):
        sums, numbers = sums + padded[..., offset : offset + size], numbers + inside[offset : offset + size]
    return sums / numbers


def likeness_to_mean(tokens: Float[Tensor, "chunks chunk dim"]) -> Float64[Tensor, "chunks chunk"]:
    """Canonical similarity of each token to the centroid of its chunk."""
    if tokens.device.type == "cpu" and tokens.shape[-1] % LANES == 0 and has_cpp():
        return likeness_by_cpp(tokens)
    chunks, size, _ = tokens.shape
    labels = torch.zeros(1, size, dtype=torch.int64, device=tokens.device)
    counts = torch.full((1, 1), size, dtype=torch.int64, device=tokens.device)
    likeness = torch.empty(chunks, size, dtype=torch.float64, device=tokens.device)
    together = max(1, WORKING_BYTES // (torch.float64.itemsize * tokens.shape[1:].numel()))
    for part, into in zip(tokens.split(together), likeness.split(together), strict=True):
        of_all = [x.expand(len(part), -1) for x in (labels, counts)]
        mean = certified_mean(part.double(), sums_are_exact(part), *of_all)  # (chunks, 1, dim)
        into.copy_(canonical_similarity(part, mean))
    return likeness
