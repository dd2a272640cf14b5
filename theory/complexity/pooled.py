"""Checks of the claims C6 to C8 of README.md: what pooled matching costs, beside others, and while decoding."""

from collections.abc import Callable
from fractions import Fraction

import numpy as np

from kvcluster import reference
from kvcluster.reference.kmeans import kmeans
from kvcluster.reference.pooled_matching import compress_entries

from ..claims import Check
from . import closed_forms
from .checks import normal, rounds_of_kmeans
from .counting import Operations, count

__all__ = ["check_compared_pairs", "check_decoding", "check_decoding_share", "check_pooled_counts"]

# entries, dim, dim_value, target, chunk_size: odd ones, rests of one and of two, chunks beyond all, no step and seven
POOLED_SHAPES = (
    *((64, 64, 64, 32, 64), (64, 16, 16, 16, 16), (65, 8, 8, 20, 16), (66, 8, 5, 40, 16), (37, 5, 3, 9, 6)),
    *((100, 3, 7, 1, 256), (128, 2, 2, 1, 8), (33, 1, 1, 32, 4), (50, 33, 2, 25, 7), (51, 33, 2, 25, 5)),
    *((9, 4, 4, 9, 4), (5, 4, 4, 8, 4), (2, 8, 8, 1, 2), (3, 8, 8, 1, 2), (90, 127, 4, 61, 3), (41, 6, 6, 13, 40)),
)
# keys, target, chunk_size: halvings, and chunks that are whole in every step
HALVED_SHAPES = ((64, 32, 16), (64, 16, 16), (128, 16, 16), (128, 32, 32), (96, 24, 12), (80, 10, 10), (64, 16, 4))
# prompt, interval, chunk_size, n_sink, n_recent, dim
DECODING_SHAPES = ((60, 4, 8, 2, 3, 8), (64, 7, 16, 0, 0, 5), (80, 0, 10, 4, 6, 4), (50, 12, 64, 1, 2, 16))


def entries_of(entries: int, dim: int, dim_value: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Keys, values and counts of two heads."""
    counts = np.random.default_rng(entries).integers(1, 9, (2, entries)).astype(np.int32)
    return normal(2, entries, dim), normal(2, entries, dim_value), counts


def check_pooled_counts(operations: Callable = closed_forms.pooled_operations) -> Check:
    """C6: compressing two heads, counted and measured in bytes."""
    wrong, largest = 0, 0
    for entries, dim, dim_value, target, chunk_size in POOLED_SHAPES:
        stored = entries_of(entries, dim, dim_value)
        counted, moved, _ = count(compress_entries, *stored, target=target, chunk_size=chunk_size)
        expected = operations(entries, dim, dim_value, target=target, chunk_size=chunk_size, problems=2)
        expected_bytes = closed_forms.pooled_bytes(entries, dim, dim_value, target=target, problems=2)
        wrong, largest = wrong + ((counted, moved) != (expected, expected_bytes)), max(largest, counted.total)
    note = f"the largest of these runs made {largest:,} operations"
    return Check("C6", "shapes counted differently", len(POOLED_SHAPES), wrong, 0, note)


def pairs_compared(tokens: int, target: int, chunk_size: int) -> int:
    """If the steps halve and all chunks are whole and even."""
    return (tokens - target) * chunk_size // 2


def most_pairs(tokens: int, target: int, chunk_size: int) -> Fraction:
    """Of any numbers."""
    n_steps = len(closed_forms.round_sizes(tokens, target)) - 1
    return Fraction(chunk_size * (2 * tokens - target + n_steps), 4)


def counted_pairs(tokens: int, target: int, chunk_size: int) -> int:
    """Quotients of similarities: all divisions but those of means; two heads of keys and values with dim 4."""
    counted, *_ = count(compress_entries, *entries_of(tokens, 4, 4), target=target, chunk_size=chunk_size)
    return counted.divisions // 2 - sum(closed_forms.round_sizes(tokens, target)[1:]) * (4 + 4)


def check_compared_pairs(pairs: Callable = pairs_compared, most: Callable = most_pairs) -> Check:
    """C7: how many pairs of keys pooled matching compares, and k-means in as many clusters."""
    wrong = 0
    for tokens, target, chunk_size in HALVED_SHAPES:
        wrong += counted_pairs(tokens, target, chunk_size) != pairs(tokens, target, chunk_size)
        keys = normal(tokens, 4)
        counted, *_ = count(kmeans, keys, n_clusters=target, max_iter=3)
        assignments, updates = rounds_of_kmeans(keys, target, 3)
        wrong += counted.divisions - updates * target * 4 != assignments * tokens * target
    for tokens, _, _, target, chunk_size in POOLED_SHAPES:
        if tokens > target:
            wrong += counted_pairs(tokens, target, chunk_size) > most(tokens, target, chunk_size)
    n, k, c, d = 32768, 6554, 256, 128
    pooled = closed_forms.pooled_operations(n, d, d, target=k, chunk_size=c).multiplications
    one_round = closed_forms.kmeans_operations(n, d, n_clusters=k, assignments=1, updates=1).multiplications
    note = (
        f"{n:,} tokens to {k:,}, chunks of {c}, dim {d}: {pooled / 1e9:.2f}e9 multiplications; times that: a round of "
        f"k-means {one_round / pooled:.0f}, n^2 d {n * n * d / pooled:.0f}, 4 n c d {4 * n * c * d / pooled:.1f}"
    )
    n_cases = 2 * len(HALVED_SHAPES) + len(POOLED_SHAPES)
    return Check("C7", "shapes with other numbers of pairs", n_cases, int(wrong), 0, note)


def cost_of_a_token(target: int, dim: int, *, interval: int, chunk_size: int) -> Fraction:
    """Multiplications of compression for each decoded token, one KV head with values of `dim` features."""
    entries = target + interval + 1
    compression = closed_forms.pooled_operations(entries, dim, dim, target=target, chunk_size=chunk_size)
    return Fraction(compression.multiplications, interval + 1)


def decode(
    prompt: int, interval: int, chunk_size: int, n_sink: int, n_recent: int, dim: int, group: int = 1
) -> tuple[int, int, int]:
    """Tokens decoded in four intervals after a prompt of which half is kept, and the multiplications that were counted.

    Those of compression come first, then those of attention to what every append returned.
    """
    cache = reference.ChelseaCache(
        ratio=0.5, max_new_tokens=0, interval=interval, chunk_size=chunk_size, n_sink=n_sink, n_recent=n_recent
    )
    count(cache.append, normal(prompt, dim), normal(prompt, dim))
    compressing = attending = Operations()
    decoded = 4 * (interval + 1)
    for token in range(decoded):
        new = normal(1, dim) * (token + 1)
        spent, _, seen = count(cache.append, new, new)
        compressing += spent
        attending += count(reference.clustered_attention, normal(group, dim), *seen)[0]
    return decoded, compressing.multiplications, attending.multiplications


def check_decoding(cost: Callable[..., Fraction] = cost_of_a_token) -> Check:
    """C8: what a decoding `ChelseaCache` spends on compression, counted."""
    wrong = 0
    for prompt, interval, chunk_size, n_sink, n_recent, dim in DECODING_SHAPES:
        decoded, compressing, _ = decode(prompt, interval, chunk_size, n_sink, n_recent, dim)
        target = prompt // 2 - n_sink - n_recent
        wrong += compressing != cost(target, dim, interval=interval, chunk_size=chunk_size) * decoded
    return Check("C8", "decodings that cost otherwise", len(DECODING_SHAPES), wrong, 0)


def largest_share(budget: int, target: int, dim: int, *, group: int, interval: int, chunk_size: int) -> Fraction:
    """Multiplications of compression over those of attention, at most, if interval + 1 <= target."""
    compression = (target + interval + 1) * (Fraction(chunk_size * (dim + 2), 4) + 3 * dim)
    attention = group * (interval + 1) * (budget + 1 + Fraction(interval, 2)) * (2 * dim + 1)
    return compression / attention


def check_decoding_share(share: Callable[..., Fraction] = largest_share) -> Check:
    """C8: compression beside attention of as many query heads, counted, over what it is at most."""
    worst = 0.0
    for group, shape in enumerate(DECODING_SHAPES, start=1):
        prompt, interval, chunk_size, n_sink, n_recent, dim = shape
        _, compressing, attending = decode(*shape, group=group)
        target = prompt // 2 - n_sink - n_recent
        most = share(prompt // 2, target, dim, group=group, interval=interval, chunk_size=chunk_size)
        worst = max(worst, float(Fraction(compressing, attending) / most))
    example = largest_share(6554, 6474, 128, group=4, interval=64, chunk_size=256)
    note = (
        f"budget 6,554, chunks of 256, dim 128, 4 query heads, interval 64: at most {float(example):.3f} of attention"
    )
    return Check("C8", "share of attention's cost / bound", len(DECODING_SHAPES), worst, 1, note)
