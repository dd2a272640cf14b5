"""Checks of the claims P6 to P8 of README.md: soft matching beside optimal matchings and clusterings; real keys."""

import itertools
from collections.abc import Callable

import numpy as np
from scipy.optimize import linear_sum_assignment

from kvcluster.reference import Clustering, alternating_partition, chunked_soft_matching, merge, similarity
from kvcluster.reference.soft_matching import match_round

from ..claims import Check
from ..real_cache import MODEL, real_cache
from .stationary import Partition, autoregressive_keys, cosines

__all__ = ["check_chunks_and_rounds", "check_optimal_clustering", "check_optimal_matching", "check_real_keys"]

N_SINK, CHUNK = 4, 64
Matcher = Callable[[np.ndarray, int], np.ndarray]


def joined(match: Matcher, keys: np.ndarray, n_merged: int) -> list[tuple[int, int]]:
    """Source and destination of every merge of one round; entries are numbered as before the round."""
    entry_of_token = match(keys, n_merged)
    sources, destinations = alternating_partition(len(keys))
    return [(i, j) for i in sources for j in destinations if entry_of_token[i] == entry_of_token[j]]


def value_of_round(match: Matcher, keys: np.ndarray, n_merged: int) -> float:
    """Summed similarity of the merged pairs; minus infinity if they are not `n_merged`."""
    pairs = joined(match, keys, n_merged)
    scores = similarity(keys, keys)
    return float(sum(scores[i, j] for i, j in pairs)) if len(pairs) == n_merged else -np.inf


def best_value(scores: np.ndarray, n_merged: int) -> float:
    """Largest sum over all ways to send `n_merged` sources to a destination each, tried one after the other."""
    choices = itertools.product(
        itertools.combinations(range(len(scores)), n_merged), itertools.product(range(scores.shape[1]), repeat=n_merged)
    )
    return max(float(scores[list(rows), list(columns)].sum()) for rows, columns in choices)


def assignment(scores: np.ndarray) -> float:
    """Largest sum where no two sources share a destination."""
    return float(scores[linear_sum_assignment(scores, maximize=True)].sum())


def keys_of_kinds(rng: np.random.Generator, tokens: int, dim: int) -> list[np.ndarray]:
    """Keys (tokens, dim), float32: independent, smooth, with exact ties."""
    smooth = autoregressive_keys(rng, (tokens, dim), 0.9)
    return [k.astype(np.float32) for k in (rng.standard_normal((tokens, dim)), smooth, np.sign(smooth))]


def check_optimal_matching(match: Matcher = match_round) -> Check:
    """P6, matching: what one round reaches, beside everything that was possible, and beside scipy's assignment."""
    rng = np.random.default_rng(6)
    worst, cases, shares = -np.inf, 0, []
    for tokens, n_merged in [(4, 1), (4, 2), (5, 2), (6, 2), (6, 3), (7, 3)] * 4:
        for keys in keys_of_kinds(rng, tokens, 4):
            scores = similarity(*(keys[half] for half in alternating_partition(tokens)))
            lead = best_value(scores, n_merged) - value_of_round(match, keys, n_merged)
            worst, cases = max(worst, lead), cases + 1
    for keys in itertools.chain.from_iterable(keys_of_kinds(rng, CHUNK, 16) for _ in range(8)):
        one_to_one = assignment(similarity(*(keys[half] for half in alternating_partition(CHUNK))))
        ours = value_of_round(match, keys, CHUNK // 2)
        worst, cases = max(worst, one_to_one - ours), cases + 1
        shares.append(one_to_one / ours)
    # the same similarities, added in another order: at most 32 of at most 1 each
    allowed = 64 * 32 * 2.0**-53
    note = (
        f"the best one-to-one assignment has {np.median(shares):.3f} of soft matching's sum (median, chunks of {CHUNK})"
    )
    return Check("P6", "sum of similarities above ours", cases, worst, allowed, note)


def all_clusterings(tokens: int, clusters: int) -> np.ndarray:
    """Labels of every way to put tokens in clusters, none empty, (ways, tokens), int64."""
    ways = [[0]]
    for _ in range(tokens - 1):
        ways = [[*way, label] for way in ways for label in range(min(max(way) + 2, clusters))]
    return np.array([way for way in ways if max(way) == clusters - 1])


def spread(keys: np.ndarray, labels: np.ndarray) -> float:
    """Summed squared distance of keys (tokens, dim) to the mean of their cluster."""
    keys = keys.astype(np.float64)
    means = np.stack([keys[labels == label].mean(axis=0) for label in range(labels.max() + 1)])
    return float(((keys - means[labels]) ** 2).sum())


def least_spread(keys: np.ndarray, clusterings: np.ndarray) -> float:
    """The smallest spread of all clusterings; found through the Gram matrix, then summed once more directly."""
    centred = keys - keys.mean(axis=0)
    is_member = (clusterings[..., None] == np.arange(clusterings.max() + 1)).astype(float)  # (ways, tokens, clusters)
    between = np.einsum(
        "wic,ij,wjc,wc->w", is_member, centred @ centred.T, is_member, 1 / is_member.sum(1), optimize=True
    )
    return min(spread(keys, clusterings[way]) for way in np.argsort(-between)[:3])


def soft_labels(keys: np.ndarray, clusters: int) -> np.ndarray:
    """One chunk's labels."""
    return chunked_soft_matching(keys, keep_ratio=clusters / len(keys), chunk_size=len(keys)).labels


def check_optimal_clustering(find: Callable[[np.ndarray, int], np.ndarray] = soft_labels) -> Check:
    """P6, clustering: spread of 8 tokens in 4 and 2 clusters, over the least spread of all clusterings."""
    rng = np.random.default_rng(60)
    ratios: dict[tuple[str, int], list[float]] = {}
    for clusters in (4, 2):
        clusterings = all_clusterings(8, clusters)
        for _ in range(40):
            for kind, keys in zip(("independent", "smooth"), keys_of_kinds(rng, 8, 16)[:2], strict=True):
                labels = find(keys, clusters)
                ratio = spread(keys, labels) / least_spread(keys, clusterings) if labels.max() == clusters - 1 else 0.0
                ratios.setdefault((kind, clusters), []).append(ratio)
    medians = (
        f"{kind}, 8 to {clusters}: {np.median(kind_ratios):.2f}" for (kind, clusters), kind_ratios in ratios.items()
    )
    all_ratios = [ratio for kind_ratios in ratios.values() for ratio in kind_ratios]
    # both spreads are sums of 8 x 16 squares of differences that are wrong by less than 2**-49 of the largest key
    allowed = 1 + 2.0**-40
    return Check(
        "P6",
        "least spread / ours",
        len(all_ratios),
        1 / min(all_ratios) if min(all_ratios) else 99,
        allowed,
        "; ".join(medians),
    )


def random_partition(rng: np.random.Generator, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    half = rng.permutation(tokens)
    return np.sort(half[: -(-tokens // 2)]), np.sort(half[-(-tokens // 2) :])


def real_chunks(model: str = MODEL) -> np.ndarray:
    """Cosines of all pairs of keys in a chunk of a real model's, (heads of all layers, chunks, CHUNK, CHUNK)."""
    keys = real_cache(model).keys.astype(np.float64)[:, :, N_SINK:]
    layers, heads, tokens, dim = keys.shape
    return cosines(keys[:, :, : tokens // CHUNK * CHUNK].reshape(layers * heads, -1, CHUNK, dim))


def mean_best_of_real_keys(partition: Partition = alternating_partition, model: str = MODEL) -> dict[str, np.ndarray]:
    """Mean cosine of a source and its best match in a real model's chunks, for several partitions, (heads,) each."""
    similar = real_chunks(model)
    rng = np.random.default_rng(7)

    def mean_best(sources: np.ndarray, destinations: np.ndarray) -> np.ndarray:
        return similar[..., sources, :][..., destinations].max(axis=-1).mean(axis=(1, 2))

    sources, destinations = partition(CHUNK)
    outer = np.isin(np.arange(CHUNK) % 4, (0, 3))
    anywhere = np.where(np.eye(CHUNK, dtype=bool), -np.inf, similar)[..., sources, :].max(axis=-1)
    return {
        "alternating": mean_best(sources, destinations),
        "abba": mean_best(np.flatnonzero(outer), np.flatnonzero(~outer)),
        "halves": mean_best(np.arange(CHUNK // 2), np.arange(CHUNK // 2, CHUNK)),
        "random": np.mean([mean_best(*random_partition(rng, CHUNK)) for _ in range(20)], axis=0),
        "anywhere": anywhere.mean(axis=(1, 2)),
    }


def check_real_keys(partition: Partition = alternating_partition, *, model: str = MODEL) -> Check:
    """P7: the partition beside 20 random ones, in every head of a model; and how far its keys keep the assumptions."""
    means, similar = mean_best_of_real_keys(partition, model), real_chunks(model)
    sources, destinations = partition(CHUNK)
    falling = np.stack([np.diagonal(similar, gap, -2, -1).mean(axis=(1, 2)) for gap in range(1, CHUNK)], axis=-1)
    nearest = destinations[similar[..., sources, :][..., destinations].argmax(axis=-1)]
    note = (
        f"{real_cache(model).title}: mean best cosine ours {means['alternating'].mean():.3f}, ABBA "
        f"{means['abba'].mean():.3f}, random {means['random'].mean():.3f}, any token of the chunk "
        f"{means['anywhere'].mean():.3f}, halves {means['halves'].mean():.3f}; the best match is a neighbour for "
        f"{(np.abs(nearest - sources) == 1).mean():.0%} of sources; mean cosine falls with distance "
        f"up to 4 in {(np.diff(falling[:, :4]) <= 0).all(axis=-1).mean():.0%} of heads, up to {CHUNK - 1} in "
        f"{(np.diff(falling) <= 0).all(axis=-1).mean():.0%}"
    )
    n_worse = int((means["random"] >= means["alternating"]).sum())
    return Check("P7", "heads where random partitions match better", len(similar), n_worse, 0, note)


def in_rounds(keys: np.ndarray, target: int, most: int) -> np.ndarray:
    """Labels of one chunk after rounds of at most `most` merges each."""
    labels, size = np.arange(len(keys)), len(keys)
    while size > target:
        n_merged = min(size // 2, size - target, most)
        labels = match_round(merge(keys, Clustering(labels, np.bincount(labels))), n_merged)[labels]
        size -= n_merged
    return labels


def chunks_in_rounds(keys: np.ndarray, chunk_size: int, most: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Keys and labels of each chunk of keys (tokens, dim) of which a quarter is kept."""
    chunks = [keys[first : first + chunk_size] for first in range(0, len(keys), chunk_size)]
    return [(chunk, in_rounds(chunk, chunk_size // 4, most)) for chunk in chunks]


def spread_left(heads: list[np.ndarray], chunk_size: int, most: int) -> tuple[float, float]:
    """Share of the spread of keys (tokens, dim) that is left inside the clusters, and tokens of a chunk's largest."""
    shares, largest = [], []
    for keys in heads:
        clustered = chunks_in_rounds(keys, chunk_size, most)
        shares.append(sum(spread(*chunk) for chunk in clustered) / spread(keys, np.zeros(len(keys), dtype=int)))
        largest.append(np.mean([np.bincount(labels).max() for _, labels in clustered]))
    return float(np.mean(shares)), float(np.mean(largest))


def check_chunks_and_rounds(
    chunk_sizes: tuple[int, ...] = (16, 64, 448), most: tuple[int, int] = (64, 2), *, model: str = MODEL
) -> Check:
    """P8: spread left by growing chunks, and by rounds that merge all they can beside rounds of two merges.

    In at most 8 layers of a real model, as far apart as can be: every fourth of 30.
    """
    layers = real_cache(model).keys
    heads = [head[N_SINK : N_SINK + 448] for layer in layers[:: -(-len(layers) // 8)] for head in layer]
    by_size = [spread_left(heads, size, size)[0] for size in chunk_sizes]
    (full, largest), (small, largest_of_small) = (spread_left(heads, CHUNK, merges) for merges in most)
    worst = max(after / before for before, after in (*itertools.pairwise(by_size), (small, full)))
    clusterings = all_clusterings(8, 2)
    eights = [head[first : first + 8] for head in heads for first in range(0, 448, CHUNK)]
    ratio = np.median([spread(eight, soft_labels(eight, 2)) / least_spread(eight, clusterings) for eight in eights])
    sizes = ", ".join(f"{left:.3f} in chunks of {n}" for n, left in zip(chunk_sizes, by_size, strict=True))
    note = (
        f"{real_cache(model).title}: spread left {sizes}; {small:.3f} in chunks of {CHUNK} with rounds of {most[1]} "
        f"merges, where the largest cluster has {largest_of_small:.1f} tokens instead of {largest:.1f}; 8 tokens to 2: "
        f"{ratio:.2f} of the least (median)"
    )
    return Check("P8", "spread left / that of the other choice", len(heads) * (len(chunk_sizes) + 2), worst, 1, note)
