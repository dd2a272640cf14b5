"""Canonical similarity, and the best matches by it without computing most of it: a filter with a proof.

The bits are those of `kvcluster.reference.similarity`. A float32 matrix product gives every cosine with an error below
a bound that holds for any order of summation (theory/exactness, claim E4). Where the best candidate leads by more
than twice the bound, the canonical similarity must agree, and is not computed; where it does not, the few candidates
inside the bound are scored canonically.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

__all__ = [
    "MAX_DIM",
    "SAFE_NORM",
    "Matches",
    "canonical_similarity",
    "certified_matches",
    "certified_top",
    "halving_sum",
    "margin",
    "matmul_unit",
    "normalized",
]

# Canonical scores are computed in parts whose terms need no more than this.
WORKING_BYTES = 2 * 2**20
# Outside of this range the squared norm could underflow or overflow in float32: such keys get canonical scores.
SAFE_NORM = (2.0**-40, 2.0**40)
MAX_DIM = 8192  # as far as claim E4 is proved


def canonical_similarity(a: Tensor, b: Tensor) -> Tensor:
    """That of each row of `a` (..., dim) with the row of `b` (..., dim) at the same place, after broadcasting."""
    a, b = a.double(), b.double()
    dot = halving_sum(a * b)
    norms = halving_sum(a * a) * halving_sum(b * b)  # both squared
    return torch.where(norms == 0, 0.0, dot * dot.abs() / norms)


def halving_sum(terms: Float64[Tensor, "*lead dim"]) -> Float64[Tensor, "*lead"]:
    """Sum over the last axis: pad with zeros to a power of two, add halves until one is left."""
    half = 1 << (terms.shape[-1] - 1).bit_length()
    terms = torch.nn.functional.pad(terms, (0, half - terms.shape[-1]))
    while half > 1:
        half //= 2
        terms = terms[..., :half] + terms[..., half:]  # (..., half)
    return terms[..., 0]


def margin(dim: int, unit: float = 2.0**-24) -> float:
    """Lead in the filter's cosines that settles a comparison: claim E4, `(4 dim + 72) * unit`."""
    return (4 * dim + 72) * unit


@dataclass(frozen=True, eq=False)
class Matches:
    """Best destination of each source.

    Attributes
    ----------
    destination : (chunks, sources), int64: index of the destination of highest canonical similarity, of ties the first.
    cosine : (chunks, sources), float32: its cosine, up to half of `margin`; for ranking, see `certified_top`.
    is_unsafe : (chunks,), bool: where a key was zero, tiny or huge and the cosines mean nothing.
    is_scored : (chunks, sources), bool: where `similarity` holds the canonical one.
    similarity : (chunks, sources), float64: canonical similarity to that destination where known, else 0.
    """

    destination: Int64[Tensor, "chunks sources"]
    cosine: Float[Tensor, "chunks sources"]
    is_unsafe: Tensor
    is_scored: Tensor
    similarity: Float64[Tensor, "chunks sources"]


def certified_matches(
    sources: Float[Tensor, "chunks sources dim"], destinations: Float[Tensor, "chunks destinations dim"]
) -> Matches:
    """The best destination of each source by canonical similarity; float32 inputs."""
    lead = margin(sources.shape[-1], matmul_unit(sources.device))
    unit_sources, is_safe_source = normalized(sources)
    unit_destinations, is_safe_destination = normalized(destinations)
    with torch.autocast(sources.device.type, enabled=False):  # it would multiply in fewer bits than `lead` allows for
        cosines = unit_sources @ unit_destinations.mT  # (chunks, sources, destinations)
    cosine, destination = cosines.max(dim=-1)
    is_candidate = cosines >= (cosine - lead).unsqueeze(-1)
    is_unsafe = ~(is_safe_source.all(dim=-1) & is_safe_destination.all(dim=-1))  # (chunks,)
    is_candidate |= is_unsafe[:, None, None]
    is_scored = (is_candidate.sum(dim=-1) > 1) | is_unsafe[:, None]
    scores = torch.zeros_like(cosine, dtype=torch.float64)

    chunk, source = is_scored.nonzero(as_tuple=True)
    terms = destinations.shape[-2] * sources.shape[-1] * torch.float64.itemsize
    for part in zip(*(index.split(max(1, WORKING_BYTES // terms)) for index in (chunk, source)), strict=True):
        row, column = is_candidate[part].nonzero(as_tuple=True)
        pair_chunk, pair_source = part[0][row], part[1][row]
        pairs = sources[pair_chunk, pair_source], destinations[pair_chunk, column]
        canonical = torch.full_like(is_candidate[part], -torch.inf, dtype=torch.float64)  # (rows, destinations)
        canonical[row, column] = canonical_similarity(*pairs)
        scores[part], destination[part] = canonical.max(dim=-1)
    return Matches(destination, cosine, is_unsafe, is_scored, scores)


def certified_top(
    matches: Matches,
    sources: Float[Tensor, "chunks sources dim"],
    destinations: Float[Tensor, "chunks destinations dim"],
    n_top: int,
) -> Int64[Tensor, "chunks n_top"]:
    """The `n_top` sources of highest canonical similarity to their destination, of ties the first; in any order.

    Scores canonically, and notes in `matches`, the sources whose place on either side of the cut is not certain.
    """
    chunks, n_sources = matches.cosine.shape
    if n_top == n_sources:
        return torch.arange(n_sources, device=sources.device).expand(chunks, n_sources)
    lead = margin(sources.shape[-1], matmul_unit(sources.device))
    ranked = matches.cosine.sort(dim=-1, descending=True).values
    last_in, first_out = ranked[:, n_top - 1, None], ranked[:, n_top, None]
    is_in = matches.cosine > first_out + lead  # beats, for certain, all that the filter leaves out
    is_out = matches.cosine < last_in - lead  # is beaten, for certain, by all that the filter takes
    is_unsafe = matches.is_unsafe[:, None]
    is_open = (~is_in & ~is_out) | is_unsafe
    is_open &= is_unsafe | (last_in - first_out <= lead)

    chunk, source = (is_open & ~matches.is_scored).nonzero(as_tuple=True)
    together = max(1, WORKING_BYTES // (sources.shape[-1] * torch.float64.itemsize))
    for part in zip(chunk.split(together), source.split(together), strict=True):
        pairs = sources[part], destinations[part[0], matches.destination[part]]
        matches.similarity[part] = canonical_similarity(*pairs)
    matches.is_scored[chunk, source] = True
    certain = torch.where(matches.cosine >= last_in, 2.0, -2.0).double()  # beyond every similarity
    return torch.where(is_open, matches.similarity, certain).argsort(dim=-1, descending=True, stable=True)[:, :n_top]


def normalized(keys: Float[Tensor, "chunks entries dim"]) -> tuple[Tensor, Tensor]:
    """Keys of length 1 in float32, and whether float32 was safe for them; else zeros."""
    keys = keys.float()
    norm = torch.linalg.vector_norm(keys, dim=-1, keepdim=True)
    is_safe = (norm > SAFE_NORM[0]) & (norm < SAFE_NORM[1]) & (keys.shape[-1] <= MAX_DIM)
    return keys * torch.where(is_safe, 1 / norm, 0.0), is_safe.squeeze(-1)


def matmul_unit(device: torch.device) -> float:
    """Unit roundoff of float32 matrix products: 2**-24, or that of bfloat16 where the user allows less precise ones."""
    backend = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    return 2.0**-24 if backend.matmul.fp32_precision in ("none", "ieee") else 2.0**-8
