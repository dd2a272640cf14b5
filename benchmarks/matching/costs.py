"""What exactness costs beside plain float32 torch: time, memory, growth with the tokens, and how often it is needed."""

import statistics
from collections.abc import Callable

from benchmarks.matching.contenders import CHUNK_SIZE, CONTENDERS, DIM, HEADS, KEEP_RATIO, TARGET, random_keys
from benchmarks.matching.memory import peak_bytes
from kvcluster.evaluation.report import Claim, Line, Section
from kvcluster.evaluation.statistics import fitted_exponent, ratios
from kvcluster.evaluation.timing import seconds_in_turn
from kvcluster.fast import SoftMatching

__all__ = ["canonical_share", "growth", "peak_memory", "time_in_turn"]

MOST_TIME = {"certified": 0.5, "public pair": 0.55}  # of plain torch, tiled
MOST_MEMORY, MOST_EXPONENT = 0.2, 1.03
Advance = Callable[[], object]  # moves the progress bar


def problem(tokens: int) -> str:
    return f"{HEADS} heads x {tokens:,} tokens x {DIM} dims, float32, chunk {CHUNK_SIZE}, keep {KEEP_RATIO}"


def time_in_turn(tokens: int, rounds: int, advance: Advance) -> Section:
    """Seconds of every contender on random keys, and their ratios to both plain versions."""
    keys = random_keys(tokens)
    runs = {name: lambda run=run: run(keys) for name, run in CONTENDERS.items()}
    seconds = seconds_in_turn(runs, rounds, advance)
    lines = []
    for name, times in seconds.items():
        to_plain, to_tiled = ratios(times, seconds["plain"]), ratios(times, seconds["plain, tiled"])
        cells = (name, f"{1e3 * statistics.median(times):.0f} ms", str(to_plain), str(to_tiled))
        most = MOST_TIME.get(name)
        claim = None if most is None else Claim(f"time of {name} over plain, tiled", to_tiled.median, most)
        lines.append(Line(cells, claim, "{:g} x plain, tiled"))
    return Section(
        f"1. Time: {problem(tokens)}",
        ("contender", "median", "ratio to plain", "ratio to plain, tiled"),
        lines,
        f"Median (least to largest) of the ratios within each of {rounds} turns. Tiled: 64 chunks at a time. Certified:"
        " C++, a chunk at a time; in torch, as many chunks as fit the cache. The public pair checks its arguments and"
        " merges from labels.",
        {"seconds": seconds},
    )


def peak_memory(tokens: int, advance: Advance, repeats: int = 3) -> Section:
    """Bytes beyond the keys, each contender in processes of its own; the largest of `repeats` counts."""
    peaks: dict[str, list[int]] = {}
    for name in CONTENDERS:
        for _ in range(repeats):
            peaks.setdefault(name, []).append(peak_bytes(name, tokens))
            advance()
    lines = []
    for name, sizes in peaks.items():
        ratio = max(sizes) / max(peaks["plain"])
        claim = Claim("peak memory of certified over plain", ratio, MOST_MEMORY) if name == "certified" else None
        tiled = max(sizes) / max(peaks["plain, tiled"])
        cells = (name, f"{max(sizes) / 1e6:.0f} MB", f"{ratio:.2f}", f"{tiled:.2f}")
        lines.append(Line(cells, claim, "{:g} x plain"))
    return Section(
        f"2. Peak memory beyond the keys: {problem(tokens)}",
        ("contender", "peak", "ratio to plain", "ratio to plain, tiled"),
        lines,
        f"Resident set, in a fresh process each; the largest of {repeats}. The keys take another"
        f" {HEADS * tokens * DIM * 4 / 1e6:.0f} MB.",
        {"peak_bytes": peaks},
    )


def growth(sizes: list[int], rounds: int, advance: Advance) -> Section:
    """Exponent of the time in the number of tokens, for the certified path and for plain torch."""
    keys = {size: random_keys(size) for size in sizes}
    names = ("certified", "plain")
    runs = {(name, n): lambda name=name, n=n: CONTENDERS[name](keys[n]) for n in sizes for name in names}
    seconds = seconds_in_turn(runs, rounds, advance)
    medians = {name: [statistics.median(seconds[name, size]) for size in sizes] for name in names}
    lines = []
    for name in names:
        exponent = fitted_exponent(sizes, medians[name])
        claim = Claim("exponent of certified", exponent, MOST_EXPONENT) if name == "certified" else None
        times = (f"{1e3 * second:.0f} ms" for second in medians[name])
        lines.append(Line((name, *times, f"{exponent:.3f}"), claim))
    return Section(
        f"3. Growth: {HEADS} heads x {DIM} dims, float32, chunk {CHUNK_SIZE}, keep {KEEP_RATIO}",
        ("contender", *(f"{size:,} tokens" for size in sizes), "exponent"),
        lines,
        f"Exponent: slope of the least-squares line through (log tokens, log median seconds of {rounds} turns).",
        {"tokens": sizes, "median_seconds": medians},
    )


def canonical_share(tokens: int) -> Line:
    """Share of rows that the float32 filter left open on random keys, as a line of table 4."""
    compressed = SoftMatching().compress(random_keys(tokens), None, chunk_size=CHUNK_SIZE, target=TARGET)
    return share_line(f"random normal keys, {DIM} dims", compressed.n_scored_rows, compressed.n_rows)


def share_line(name: str, scored: int, rows: int) -> Line:
    return Line((name, f"{rows:,}", f"{scored:,}", f"{scored / rows:.4%}"))
