"""The most similar centroid of each token, by canonical similarity: a filter with a proof, tile by tile.

As `certified_matches`, with two differences that many tokens and few clusters ask for: similarities lie as (clusters,
tokens), so that the best of a token is found for many tokens at once, and one key that is not safe for float32 costs
canonical scores for itself only.
"""

import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor

from ..exact.similarity import canonical_similarity, margin, matmul_unit, normalized

__all__ = ["assign"]

# Similarities are held at once up to this many bytes, so that they stay in the processor's cache.
WORKING_BYTES = 2 * 2**20
DIGIT = 128  # integers up to this are exact in every format that a matrix product may cut its inputs to


def assign(
    keys: Float[Tensor, "problems tokens dim"],
    unit_keys: Float32[Tensor, "problems tokens dim"],
    is_safe_key: Bool[Tensor, "problems tokens"],
    centroids: Float32[Tensor, "problems clusters dim"],
) -> tuple[Int64[Tensor, "problems tokens"], int]:
    """Labels, of ties the first cluster, and how many tokens needed canonical scores.

    `unit_keys` and `is_safe_key` are `normalized(keys)`, which does not change from round to round.
    """
    problems, tokens, dim = keys.shape
    n_clusters = centroids.shape[1]
    unit_centroids, is_safe = normalized(centroids)
    labels = torch.empty(problems, tokens, dtype=torch.int64, device=keys.device)
    digits = digits_of_clusters(n_clusters, keys.device)
    most_open = max(1, WORKING_BYTES // (n_clusters * dim * torch.float64.itemsize))
    opened: list[tuple[Tensor, Tensor, Tensor]] = []  # problem, token and candidates of what the filter left open
    n_open = n_scored = 0
    columns = max(1, WORKING_BYTES // (n_clusters * torch.float32.itemsize))  # tokens of a tile
    together = max(1, columns // max(1, tokens))  # problems of a tile
    for first_problem in range(0, problems, together):
        for first_token in range(0, tokens, columns):
            rows = slice(first_problem, first_problem + together)
            tile = rows, slice(first_token, first_token + columns)
            is_candidate = candidates(unit_keys[tile], is_safe_key[tile], unit_centroids[rows], is_safe[rows])
            labels[tile], problem, token = only_candidates(is_candidate, digits)
            if len(problem) == 0:
                continue
            for part in zip(problem.split(most_open), token.split(most_open), strict=True):
                is_open = is_candidate[part[0], :, part[1]] > 0  # (rows, clusters)
                opened.append((part[0] + first_problem, part[1] + first_token, is_open))
                n_open += len(is_open)
                if n_open >= most_open:
                    n_scored += settle(opened, keys, centroids, labels)
                    opened, n_open = [], 0
    return labels, n_scored + settle(opened, keys, centroids, labels)


def candidates(
    unit_keys: Float32[Tensor, "problems tokens dim"],
    is_safe_key: Bool[Tensor, "problems tokens"],
    unit_centroids: Float32[Tensor, "problems clusters dim"],
    is_safe: Bool[Tensor, "problems clusters"],
) -> Float32[Tensor, "problems clusters tokens"]:
    """1 where a cluster may be a token's most similar one, 0 where the filter proves that it is not."""
    lead = margin(unit_keys.shape[-1], matmul_unit(unit_keys.device))
    with torch.autocast(unit_keys.device.type, enabled=False):  # it would multiply in fewer bits than `lead` allows for
        cosines = unit_centroids @ unit_keys.mT  # (problems, clusters, tokens)
    is_unsafe = ~is_safe.unsqueeze(-1)
    has_unsafe = bool(is_unsafe.any())
    if has_unsafe:
        cosines.masked_fill_(is_unsafe, -torch.inf)  # no measure for the others
    threshold = cosines.amax(dim=1, keepdim=True) - lead
    threshold.masked_fill_(~is_safe_key.unsqueeze(1), -torch.inf)
    is_candidate = cosines.ge_(threshold)
    return is_candidate.masked_fill_(is_unsafe, 1.0) if has_unsafe else is_candidate


def digits_of_clusters(n_clusters: int, device: torch.device) -> Float32[Tensor, "4 clusters"]:
    """Ones, then the index of each cluster in three digits: see `only_candidates`."""
    clusters = torch.arange(n_clusters, device=device)
    digits = [torch.ones_like(clusters), clusters % DIGIT, clusters // DIGIT % DIGIT, clusters // DIGIT**2]
    return torch.stack(digits).float()


def only_candidates(
    is_candidate: Float32[Tensor, "problems clusters tokens"], digits: Float32[Tensor, "4 clusters"]
) -> tuple[Int64[Tensor, "problems tokens"], Tensor, Tensor]:
    """The candidate of each token that has only one, found as a sum; problem and token of the others."""
    with torch.autocast(is_candidate.device.type, enabled=False):
        sums = digits @ is_candidate  # exact where there is one candidate, (problems, 4, tokens)
    n_candidates, low, middle, high = sums.unbind(dim=1)
    problem, token = (n_candidates != 1).nonzero(as_tuple=True)
    return (low + DIGIT * middle + DIGIT**2 * high).long(), problem, token


def settle(opened: list[tuple[Tensor, Tensor, Tensor]], keys: Tensor, centroids: Tensor, labels: Tensor) -> int:
    """Write the candidate of highest canonical similarity of each open token into `labels`; how many they were."""
    if not opened:
        return 0
    problem, token, is_open = (torch.cat(parts) for parts in zip(*opened, strict=True))
    row, cluster = is_open.nonzero(as_tuple=True)
    pairs = keys[problem[row], token[row]], centroids[problem[row], cluster]
    scores = torch.full_like(is_open, -torch.inf, dtype=torch.float64)
    scores[row, cluster] = canonical_similarity(*pairs)
    labels[problem, token] = scores.argmax(dim=-1)  # of ties, the first
    return len(problem)
