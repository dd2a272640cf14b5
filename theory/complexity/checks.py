"""Checks of the claims C1 to C5 of README.md: what every algorithm costs, counted and timed while it runs."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator

import numpy as np

from kvcluster import reference
from kvcluster.reference.kmeans import Clusters, kmeans

from ..claims import Check
from . import closed_forms
from .counting import count

__all__ = [
    "check_attention_counts",
    "check_break_even",
    "check_break_even_in_time",
    "check_count_exponents",
    "check_kmeans_counts",
    "check_matching_counts",
    "check_time_exponents",
]

# tokens, dim, keep_ratio, chunk_size: odd ones, rests, one token, dim 1, no rounds and six; then un-chunked
MATCHING_SHAPES = (
    *((64, 64, 0.5, 64), (128, 80, 0.25, 64), (130, 16, 0.2, 64), (63, 8, 0.25, 64), (200, 5, 0.6, 50)),
    *((96, 3, 0.1, 32), (77, 1, 0.25, 7), (65, 33, 1.0, 16), (64, 2, 1 / 64, 64), (45, 127, 0.3, 9), (90, 4, 0.75, 30)),
    *((2, 8, 0.5, 2), (5, 8, 0.4, 5), (0, 8, 0.5, 4), (1, 8, 0.5, 1), (12, 7, 0.5, 3)),
    *((33, 16, 0.5, 33), (100, 8, 0.5, 100), (128, 64, 0.25, 128), (301, 2, 0.2, 301), (64, 1, 0.1, 64)),
)
# tokens, dim, n_clusters, max_iter: more than 128 tokens are assigned in parts
KMEANS_SHAPES = (
    *((1, 1, 1, 1), (40, 8, 4, 3), (128, 16, 5, 2), (129, 3, 2, 4), (300, 64, 4, 10), (257, 5, 40, 6), (60, 33, 60, 9)),
    *((200, 2, 7, 30), (90, 1, 3, 8), (150, 80, 2, 1)),
)
# queries, entries, dim, dim_value
ATTENTION_SHAPES = (
    *((1, 1, 1, 1), (1, 100, 64, 64), (3, 65, 80, 80), (4, 2, 128, 1), (7, 33, 5, 9), (64, 64, 16, 16)),
    *((1, 1000, 8, 3), (2, 17, 1, 40), (9, 300, 33, 2), (4, 63, 64, 128)),
)
# tokens, dim, group, keep_ratio, chunk_size
BREAK_EVEN_SHAPES = (
    *((128, 16, 1, 0.5, 64), (128, 16, 3, 0.25, 64), (256, 8, 1, 0.25, 64), (96, 64, 4, 0.25, 32), (80, 5, 2, 0.3, 20)),
    *((64, 32, 1, 0.125, 16), (120, 3, 1, 0.75, 40), (128, 16, 1, 0.5, 128)),
)


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def check_matching_counts(operations: Callable = closed_forms.matching_operations) -> Check:
    """C1: chunked and un-chunked matching, two heads each, counted and measured in bytes."""
    wrong, largest = 0, 0
    for tokens, dim, keep_ratio, chunk_size in MATCHING_SHAPES:
        counted, moved, _ = count(
            reference.chunked_soft_matching, normal(2, tokens, dim), keep_ratio=keep_ratio, chunk_size=chunk_size
        )
        expected, expected_bytes = (
            form(tokens, dim, keep_ratio=keep_ratio, chunk_size=chunk_size, problems=2)
            for form in (operations, closed_forms.matching_bytes)
        )
        wrong, largest = wrong + ((counted, moved) != (expected, expected_bytes)), max(largest, counted.total)
    note = f"the largest of these runs made {largest:,} operations"
    return Check("C1", "shapes counted differently", len(MATCHING_SHAPES), wrong, 0, note)


def check_kmeans_counts(operations: Callable = closed_forms.kmeans_operations) -> Check:
    """C2: k-means, stopped by `max_iter` or by itself."""
    wrong, stopped = 0, 0
    for tokens, dim, n_clusters, max_iter in KMEANS_SHAPES:
        keys = normal(tokens, dim)
        counted, moved, _ = count(kmeans, keys, n_clusters=n_clusters, max_iter=max_iter)
        assignments, updates = rounds_of_kmeans(keys, n_clusters, max_iter)
        expected = operations(tokens, dim, n_clusters=n_clusters, assignments=assignments, updates=updates)
        expected_bytes = closed_forms.kmeans_bytes(tokens, dim, n_clusters=n_clusters)
        wrong, stopped = wrong + ((counted, moved) != (expected, expected_bytes)), stopped + (updates < assignments)
    note = f"labels repeated before the last round in {stopped} of them"
    return Check("C2", "shapes counted differently", len(KMEANS_SHAPES), wrong, 0, note)


def rounds_of_kmeans(keys: np.ndarray, n_clusters: int, max_iter: int) -> tuple[int, int]:
    """How often k-means assigns and updates, found from its results with fewer rounds: they stop changing."""
    before: Clusters | None = None
    for rounds in range(1, max_iter + 1):
        now = kmeans(keys, n_clusters=n_clusters, max_iter=rounds)
        if before is not None and np.array_equal(now.labels, before.labels):
            return rounds, rounds - 1
        before = now
    return max_iter, max_iter


def check_attention_counts(operations: Callable = closed_forms.attention_operations) -> Check:
    """C3: full and clustered attention, and the means that the latter reads."""
    wrong = 0
    for queries, entries, dim, dim_value in ATTENTION_SHAPES:
        query, keys, values = normal(2, queries, dim), normal(2, entries, dim), normal(2, entries, dim_value)
        shape = (queries, entries, dim, dim_value)
        counted, moved, _ = count(reference.attention, query, keys, values)
        wrong += (counted, moved) != (operations(*shape, problems=2), closed_forms.attention_bytes(*shape, problems=2))
        counts = np.ones((2, entries), dtype=np.int32)
        counted, moved, _ = count(reference.clustered_attention, query, keys, values, counts)
        expected_bytes = closed_forms.attention_bytes(*shape, bytes_of_count=4, problems=2)
        wrong += (counted, moved) != (operations(*shape, is_clustered=True, problems=2), expected_bytes)
        clustering = reference.chunked_soft_matching(keys, keep_ratio=0.5, chunk_size=4)
        counted, *_ = count(reference.merge, values, clustering)
        wrong += counted != closed_forms.merge_operations(2 * entries, clustering.counts.size, dim_value)
    return Check("C3", "shapes counted differently", 3 * len(ATTENTION_SHAPES), wrong, 0)


def fitted_exponent(sizes: list[int], costs: list[float]) -> float:
    """Slope of the least-squares line through (log size, log cost)."""
    return float(np.polyfit(np.log(sizes), np.log(costs), 1)[0])


def check_count_exponents(chunk_size_of: Callable[[int], int] = lambda tokens: 64) -> Check:
    """C4, counts: all operations, from 4,096 to 1,048,576 tokens, beside one chunk of all tokens."""
    sizes = [2**power for power in range(12, 21)]
    chunked, whole = (
        fitted_exponent(
            sizes,
            [closed_forms.matching_operations(n, 64, keep_ratio=0.5, chunk_size=size_of(n)).total for n in sizes],
        )
        for size_of in (chunk_size_of, lambda tokens: tokens)
    )
    return exponents("C4", chunked, whole, 2 * len(sizes), "of counts")


def exponents(claim: str, chunked: float, whole: float, cases: int, what: str) -> Check:
    """Chunked at most 1.05, un-chunked at least 1.9: how far the worse of the two is beyond that."""
    note = f"exponent {what}: chunked {chunked:.3f}, un-chunked {whole:.3f}"
    return Check(claim, f"exponent {what} beyond 1.05, 1.9", cases, max(chunked - 1.05, 1.9 - whole), 0, note)


def check_time_exponents(chunk_size_of: Callable[[int], int] = lambda tokens: 64, turns: int = 5) -> Check:
    """C4, time: processor seconds, the least of several runs taken in turn; of up to five times as many if need be.

    What other programs do to the processor's caches lasts: more turns find a moment without them, and cannot make
    what is quadratic linear.

    Chunked is the reference. Un-chunked is the torch path: the reference holds all products of all pairs, which are
    gigabytes for some thousand tokens.
    """
    import torch

    from kvcluster import fast

    def chunked_run(tokens: int) -> Callable[[], object]:
        keys = normal(tokens, 16)
        return lambda: reference.chunked_soft_matching(keys, keep_ratio=0.5, chunk_size=chunk_size_of(tokens))

    def whole_run(tokens: int) -> Callable[[], object]:
        keys = torch.from_numpy(normal(tokens, 64))
        return lambda: fast.chunked_soft_matching(keys, keep_ratio=0.5, chunk_size=tokens)

    chunked_sizes, whole_sizes = [4096, 8192, 16384, 32768], [2048, 4096, 8192]
    runs = [(chunked_run(tokens), 32768 // tokens) for tokens in chunked_sizes]
    runs += [(whole_run(tokens), (8192 // tokens) ** 2) for tokens in whole_sizes]
    seconds = [math.inf] * len(runs)
    for _ in range(5):
        seconds = list(map(min, seconds, least_seconds(runs, turns)))
        chunked = fitted_exponent(chunked_sizes, seconds[: len(chunked_sizes)])
        whole = fitted_exponent(whole_sizes, seconds[len(chunked_sizes) :])
        check = exponents("C4", chunked, whole, len(seconds), "of time")
        if check.holds:
            break
    return check


def least_seconds(runs: list[tuple[Callable[[], object], int]], turns: int) -> list[float]:
    """Processor seconds of each run, the least of `turns`: what other programs do to the machine can only add.

    Each is repeated as often as given, so that all are timed for about as long. On one thread: threads that wait for
    each other on a busy machine spend processor time as well.
    """
    least = [math.inf] * len(runs)
    with one_thread():
        for _ in range(turns):
            for i, (run, repeats) in enumerate(runs):
                start = time.process_time()
                for _ in range(repeats):
                    run()
                least[i] = min(least[i], (time.process_time() - start) / repeats)
    return least


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """While open, torch computes on one thread."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def check_break_even(break_even: Callable = closed_forms.break_even) -> Check:
    """C5, counts: compress, then decode token by token with both caches, until the clustered one has spent less."""
    wrong, generated_tokens = 0, []
    for tokens, dim, group, keep_ratio, chunk_size in BREAK_EVEN_SHAPES:
        spent, saved = balance(tokens, dim, group, keep_ratio=keep_ratio, chunk_size=chunk_size)
        generated = next(n for n, total in enumerate(saved, start=1) if total >= spent)
        wrong += generated != break_even(tokens, dim, group=group, keep_ratio=keep_ratio, chunk_size=chunk_size)
        generated_tokens.append(generated)
    note = f"after {min(generated_tokens)} to {max(generated_tokens)} generated tokens"
    return Check("C5", "break-even elsewhere than counted", len(BREAK_EVEN_SHAPES), wrong, 0, note)


def balance(tokens: int, dim: int, group: int, *, keep_ratio: float, chunk_size: int) -> tuple[int, Iterator[int]]:
    """Multiplications that compressing took, and how many decoding has saved after 1, 2, .. tokens; all counted."""
    keys, new = normal(tokens, dim), normal(1, dim)
    matching, _, clustering = count(reference.chunked_soft_matching, keys, keep_ratio=keep_ratio, chunk_size=chunk_size)
    merging, _, centroids = count(reference.merge, keys, clustering)  # once for keys, once for values

    def savings() -> Iterator[int]:
        saved, full, clustered, counts = 0, keys, centroids, clustering.counts
        while True:
            full, clustered = (np.concatenate([array, new]) for array in (full, clustered))
            counts = np.append(counts, 1)
            query = normal(group, dim)
            full_cost, *_ = count(reference.attention, query, full, full)
            clustered_cost, *_ = count(reference.clustered_attention, query, clustered, clustered, counts)
            saved += full_cost.multiplications - clustered_cost.multiplications
            yield saved

    return (matching + merging * 2).multiplications, savings()


def check_break_even_in_time(tokens: int = 8192) -> Check:
    """C5, time: the torch path compresses and decodes one layer of 8 KV heads; tokens until it has paid."""
    import torch

    from kvcluster import fast

    keys, query = torch.from_numpy(normal(8, tokens, 64)), torch.from_numpy(normal(8, 4, 64))
    clustering = fast.chunked_soft_matching(keys, keep_ratio=0.25)
    centroids = fast.merge(keys, clustering)

    def compress() -> None:
        clustering = fast.chunked_soft_matching(keys, keep_ratio=0.25)
        for array in (keys, keys):  # the second time in place of values
            fast.merge(array, clustering)

    compressing, full, clustered = least_seconds(
        [
            (compress, 1),
            (lambda: fast.attention(query, keys, keys), 50),
            (lambda: fast.clustered_attention(query, centroids, centroids, clustering.counts), 50),
        ],
        turns=10,
    )
    generated = compressing / (full - clustered) if full > clustered else math.inf
    by_count = closed_forms.break_even(tokens, 64, group=4, keep_ratio=0.25, chunk_size=64)
    note = (
        f"{tokens:,} tokens, 8 heads: compressing {1e3 * compressing:.1f} ms, a token {1e3 * full:.2f} ms full and "
        f"{1e3 * clustered:.2f} ms clustered, so paid back after {generated:.0f} tokens ({by_count} by count)"
    )
    return Check("C5", "generated tokens until paid back", 1, generated, tokens, note)
