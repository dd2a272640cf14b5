"""The cost of certified decisions on this CPU, beside plain float32 torch: `python benchmarks/matching/run.py`.

Five tables; each line with a target says whether it is met. Ratios are of runs taken in turn in one process, so they
bear a noisy machine better than seconds do; yet two processes that want the same cores slow many small operations far
more than few large ones, so run it alone. About three minutes; `--quick` takes smaller problems and no model.
"""

import argparse
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # of a script only its own folder is on the path

import torch
from rich.console import Console
from rich.progress import Progress

from benchmarks.matching.contenders import CONTENDERS, TOKENS
from benchmarks.matching.costs import canonical_share, growth, peak_memory, time_in_turn
from kvcluster.evaluation.machine import describe
from kvcluster.evaluation.report import Line, Section, print_sections

__all__ = ["main"]

RESULTS = Path(__file__).resolve().parent / "results" / "costs.json"
REPEATS = 3  # processes a contender, for the peak memory
GROWTH_SIZES = (8_192, 16_384, 32_768, 65_536)
PREFILL_TOKENS, PREFILL_ROUNDS = 4_096, 3


def main() -> int:
    """Measure, print, write; the exit status is 0 unless --check finds a target missed."""
    parser = argparse.ArgumentParser(description="The cost of certified decisions on this CPU.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all numbers; only there with --quick")
    parser.add_argument("--quick", action="store_true", help="a quarter of the tokens, fewer turns, no model")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a target is missed")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    console = Console(width=None if sys.stdout.isatty() else 120)
    machine = describe()
    console.print(", ".join(f"{name} {value}" for name, value in machine.items()))
    sections = measure(arguments.quick, console)
    print_sections(console, sections)
    file = arguments.json or (None if arguments.quick else RESULTS)
    if file is not None:
        file.parent.mkdir(exist_ok=True)
        content = {
            "machine": machine,
            "quick": arguments.quick,
            "sections": [section.as_json() for section in sections],
        }
        file.write_text(json.dumps(content, indent=1) + "\n")
    is_missed = any(not claim.is_met for section in sections for claim in section.claims)
    return 1 if arguments.check and is_missed else 0


def measure(quick: bool, console: Console) -> list[Section]:
    """All tables, with a progress bar each."""
    smaller, rounds = (4, 3) if quick else (1, 9)
    tokens, sizes = TOKENS // smaller, [size // smaller for size in GROWTH_SIZES]
    with Progress(console=console, transient=True) as progress:

        def bar(name: str, steps: int):
            task = progress.add_task(name, total=steps)
            return lambda: progress.advance(task)

        sections = [
            time_in_turn(tokens, rounds, bar("time", (rounds + 1) * len(CONTENDERS))),
            peak_memory(tokens, bar("memory", REPEATS * len(CONTENDERS)), REPEATS),
            growth(sizes, rounds, bar("growth", (rounds + 1) * len(sizes) * 2)),
        ]
        shares = [canonical_share(tokens)]
        if quick:
            return [*sections, share_section(shares)]
        from benchmarks.matching.smollm2 import prefill_share, prefilled, smollm2_canonical_share

        advance = bar("model", 2 * (PREFILL_ROUNDS + 1))
        model, prompt, full = prefilled(PREFILL_TOKENS)
        shares.append(smollm2_canonical_share(full))
        return [*sections, share_section(shares), prefill_share(model, prompt, full, PREFILL_ROUNDS, advance)]


def share_section(lines: list[Line]) -> Section:
    return Section(
        "4. Rows that needed canonical scores, in all rounds",
        ("keys", "rows", "scored", "share"),
        lines,
        "A row is a source that looks for its destination.",
        {"rows": [line.cells for line in lines]},
    )


if __name__ == "__main__":
    raise SystemExit(main())
