"""Checks of claim P11 of README.md: the best matches of all chunks together.

Similarities are integers and keys small, so that everything is tried: every partition of every chunk, and every way to
send sources to destinations of their chunk.
"""

import itertools
from collections.abc import Callable, Iterator

import numpy as np

from kvcluster.reference import alternating_partition, similarity
from kvcluster.reference.pooled_matching import pooled_round

from ..claims import Check
from .checks import Partition, all_partitions
from .convexity import hinges, moving_windows, place_of, sorted_matches
from .optimal import best_value, keys_of_kinds

__all__ = ["check_oldest_first", "check_pooled_cut", "check_pooled_partitions", "check_unlike_chunks"]

Step = Callable[[np.ndarray, int, int], np.ndarray]
CHUNKS = ((2, 2), (4, 2), (3, 3), (4, 3), (5, 2), (4, 4), (5, 4), (6, 3), (2, 2, 2), (3, 3, 2), (4, 4, 2))


def pooled_scores(keys: np.ndarray, chunk_size: int) -> tuple[list[int], list[int], np.ndarray]:
    """All sources, all destinations, and their similarities: minus infinity across chunks."""
    firsts = range(0, len(keys), chunk_size)
    sizes = [min(chunk_size, len(keys) - first) for first in firsts]
    split = [[first + half for half in alternating_partition(size)] for first, size in zip(firsts, sizes, strict=True)]
    sources, destinations = (np.concatenate(halves) for halves in zip(*split, strict=True))
    apart = sources[:, None] // chunk_size != destinations // chunk_size
    scores = np.where(apart, -np.inf, similarity(keys[sources], keys[destinations]))
    return sources.tolist(), destinations.tolist(), scores


def check_pooled_cut(step: Step = pooled_round) -> Check:
    """P11: the similarity that one step merges, beside all ways to send as many sources to a destination each."""
    rng = np.random.default_rng(11)
    worst, cases = -np.inf, 0
    for size, chunk_size in [(4, 2), (5, 2), (6, 3), (6, 4), (7, 3), (7, 4), (5, 4)] * 3:
        for n_merged, keys in itertools.product(range(1, size // 2 + 1), keys_of_kinds(rng, size, 4)):
            sources, destinations, scores = pooled_scores(keys, chunk_size)
            entries = step(keys, n_merged, chunk_size)
            joined = entries[sources][:, None] == entries[destinations]
            ours = float(scores[joined].sum()) if joined.sum() == n_merged else -np.inf
            worst, cases = max(worst, best_value(scores, n_merged) - ours), cases + 1
    # the same similarities, added in another order: at most 3 of at most 1 each
    return Check("P11", "sum of similarities above ours", cases, worst, 2 * 3 * 3 * 2.0**-53)


def matches_of_chunks(sizes: tuple[int, ...], similarities: list[np.ndarray]) -> Iterator[tuple[tuple, np.ndarray]]:
    """For every choice of a partition in each chunk: its number in each, and all best matches, best first."""
    rows = [sorted_matches(f, all_partitions(size)) for size, f in zip(sizes, similarities, strict=True)]
    for choice in itertools.product(*(range(len(matches)) for matches in rows)):
        pooled = np.concatenate([matches[row] for matches, row in zip(rows, choice, strict=True)])
        yield choice, -np.sort(-pooled)


def non_increasing(size: int) -> Iterator[np.ndarray]:
    """Every similarity of distance alone with values 0 and 1 that does not rise."""
    for ones in range(size):
        yield (np.arange(size) <= ones).astype(int)


def leads(sizes: tuple[int, ...], similarities: list[np.ndarray], partition: Partition) -> Iterator[tuple[bool, int]]:
    """For every choice of a partition in each chunk: whether it has as many sources in each as ours, and its lead.

    The lead is in the sum of the k best matches of all chunks, the largest of all k up to half of the entries for which
    both have sources.
    """
    splits = [all_partitions(size) for size in sizes]
    matches = [sorted_matches(f, split) for f, split in zip(similarities, splits, strict=True)]
    numbers = [split.sum(axis=1) for split in splits]

    def sums_of(choice: tuple[int, ...]) -> tuple[list[int], np.ndarray]:
        pooled = np.concatenate([found[row] for found, row in zip(matches, choice, strict=True)])
        return [int(n[row]) for n, row in zip(numbers, choice, strict=True)], (-np.sort(-pooled)).cumsum()

    wanted, our_sums = sums_of(tuple(place_of(partition, split) for split in splits))
    for choice in itertools.product(*(range(len(split)) for split in splits)):
        found, sums = sums_of(choice)
        n_compared = min(sum(found), sum(wanted), sum(sizes) // 2)
        yield found == wanted, int((sums - our_sums)[:n_compared].max(initial=0))


def is_compared(has_same_similarity: bool, has_same_numbers: bool) -> bool:
    """P11 says nothing of unlike chunks in which others have other numbers of sources."""
    return has_same_similarity or has_same_numbers


def check_pooled_partitions(
    partition: Partition = alternating_partition, is_compared: Callable[[bool, bool], bool] = is_compared
) -> Check:
    """P11: the k best matches of all chunks, for every k, beside other choices of partitions."""
    rng = np.random.default_rng(12)
    wrong = cases = 0
    for sizes, is_same in itertools.product(CHUNKS, (True, False, False)):
        falling = np.sort(rng.integers(0, 9, (len(sizes), max(sizes))))[:, ::-1]
        similarities = [falling[0 if is_same else chunk, :size] for chunk, size in enumerate(sizes)]
        for has_same_numbers, lead in leads(sizes, similarities, partition):
            if is_compared(is_same, has_same_numbers):
                wrong, cases = wrong + (lead > 0), cases + 1
    return Check("P11", "choices of partitions that are better", cases, wrong, 0)


def cuts(entries: int) -> Iterator[tuple[int, ...]]:
    """Every way to cut entries into chunks of at least two: an entry alone finds no destination."""
    if entries == 0:
        yield ()
    for first in range(2, entries + 1):
        yield from ((first, *rest) for rest in cuts(entries - first))


def smallest_loss(partition: Partition) -> int:
    """Fewest entries of chunks with similarities of their own at which another choice of partitions is better."""
    for entries in range(2, 8):
        for sizes in cuts(entries):
            for similarities in itertools.product(*map(non_increasing, sizes)):
                if any(lead > 0 for _, lead in leads(sizes, list(similarities), partition)):
                    return entries
    raise AssertionError("no counterexample up to 7 entries")


def check_unlike_chunks(partition: Partition = alternating_partition) -> Check:
    """P11: where chunks are unlike and numbers of sources free, 6 entries are the fewest at which alternation loses."""
    found = smallest_loss(partition)
    note = f"with {found} entries another choice of partitions has better matches"
    return Check("P11", "smallest counterexamples of another size", 1, int(found != 6), 0, note)


def first_sources(sources: np.ndarray, n_merged: int) -> np.ndarray:
    """The oldest ones."""
    return sources[:n_merged]


def check_oldest_first(merging: Callable[[np.ndarray, int], np.ndarray] = first_sources) -> Check:
    """P11: which sources merge in one step if similarity is the same function of the distance everywhere."""
    wrong = cases = 0
    for tokens, chunk_size in [(8, 4), (11, 4), (12, 6), (13, 4), (16, 8), (10, 3)]:
        destinations = np.arange(tokens) % chunk_size % 2
        is_alone = (np.arange(tokens) == tokens - 1) & (tokens % chunk_size == 1)
        sources = np.flatnonzero((destinations == 0) & ~is_alone)
        for f, n_merged in itertools.product(hinges(tokens), range(1, tokens // 2 + 1)):
            labels = pooled_round(moving_windows(f).astype(np.float32), n_merged, chunk_size)
            stays = np.setdiff1d(np.arange(tokens), merging(sources, n_merged))
            wrong += int((labels[stays] != np.arange(tokens - n_merged)).any())
            cases += 1
    return Check("P11", "steps that merge other sources", cases, wrong, 0)
