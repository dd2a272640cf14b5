"""What the checks of public attention cost, beside the attention inside: `python benchmarks/checks/run.py`.

Ratios of calls taken in turn in one process. About a minute; `--quick` takes fewer entries and turns. On a machine that
others use, `--processor` counts the processor's time on one thread, which waits for nobody.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # of a script only its own folder is on the path

import torch
from rich.console import Console

from kvcluster.evaluation.machine import describe
from kvcluster.evaluation.report import Claim, Line, Section, print_sections
from kvcluster.evaluation.statistics import ratios
from kvcluster.evaluation.timing import seconds_in_turn
from kvcluster.fast import attention, clustered_attention
from kvcluster.fast.attention import attend_entries

__all__ = ["main"]

RESULTS = Path(__file__).resolve().parent / "results" / "checks.json"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEADS, GROUP, DIM = 8, 4, 128
ENTRIES, ROUNDS = 8_192, 101
MOST_TIME = 1.1


def main() -> int:
    """Measure, print, write; the exit status is 0 unless --check finds a target missed."""
    parser = argparse.ArgumentParser(description="Public attention beside the attention inside, on this CPU.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all numbers; only there with --quick")
    parser.add_argument("--quick", action="store_true", help="an eighth of the entries, fewer turns")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a target is missed")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    parser.add_argument("--processor", action="store_true", help="time of the processor, not of the clock; one thread")
    arguments = parser.parse_args()
    arguments.threads = 1 if arguments.processor else arguments.threads
    torch.set_num_threads(arguments.threads)
    console = Console(width=None if sys.stdout.isatty() else 120)
    machine = describe() | {"clock": "processor" if arguments.processor else "wall"}
    console.print(", ".join(f"{name} {value}" for name, value in machine.items()))
    smaller, rounds = (8, 5) if arguments.quick else (1, ROUNDS)
    section = public_and_inner(
        ENTRIES // smaller, rounds, time.process_time if arguments.processor else time.perf_counter
    )
    print_sections(console, [section])
    file = arguments.json or (None if arguments.quick else RESULTS)
    if file is not None:
        file.parent.mkdir(exist_ok=True)
        content = {"machine": machine, "quick": arguments.quick, "sections": [section.as_json()]}
        file.write_text(json.dumps(content, indent=1) + "\n")
    return 1 if arguments.check and not all(claim.is_met for claim in section.claims) else 0


def public_and_inner(entries: int, rounds: int, clock: Callable[[], float]) -> Section:
    """Time of the public functions over that of the attention that they call, without and with counts."""
    lines, numbers = [], {}
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        generator = torch.Generator().manual_seed(0)
        shapes = (1, HEADS, GROUP, DIM), (1, HEADS, entries, DIM), (1, HEADS, entries, DIM)
        query, keys, values = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
        counts = torch.randint(1, 9, shapes[1][:3], generator=generator)
        narrow = counts.int()
        contenders = {
            "attention": lambda x=(query, keys, values): attention(*x),
            "inside": lambda x=(query, keys, values): attend_entries(*x, None),
            "clustered": lambda x=(query, keys, values, counts): clustered_attention(*x),
            "clustered inside": lambda x=(query, keys, values, narrow): attend_entries(*x),
        }
        seconds = seconds_in_turn(contenders, rounds, clock=clock)
        for public, inner in (("attention", "inside"), ("clustered", "clustered inside")):
            ratio = ratios(seconds[public], seconds[inner])
            medians = (f"{1e3 * statistics.median(seconds[each]):.2f} ms" for each in (public, inner))
            function = "attention" if public == "attention" else "clustered_attention"
            claim = Claim(f"{function} in {name} over what is inside", ratio.median, MOST_TIME)
            lines.append(Line((f"{function}, {name}", *medians, str(ratio)), claim))
        numbers[name] = seconds
    return Section(
        f"Public functions: {HEADS} heads x {entries:,} entries x {DIM} dims, {GROUP} queries each",
        ("function", "public", "inside", "ratio"),
        lines,
        f"Median (least to largest) of the ratios within each of {rounds} turns. Counts are int64, inside int32.",
        {"seconds": numbers},
    )


if __name__ == "__main__":
    raise SystemExit(main())
