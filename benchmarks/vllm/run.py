"""Attention to vLLM's pages and what a pool serves, stock beside clustered: `python benchmarks/vllm/run.py`.

Needs the environment that `make vllm` makes. Writes results/attention.json and results/pools.json, and draws
docs/figures/serving-pools.png where there is matplotlib; `--draw` only draws, which needs no vLLM.
"""

import argparse
import importlib.util
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # of a script only its own folder is on the path

from benchmarks.vllm.pools import CASES, measure_pools, show_pools

__all__ = ["main"]

RESULTS = Path(__file__).resolve().parent / "results"
PARTS = ("attention", "pools")


def main() -> None:
    """Measure, print, write, draw."""
    parser = argparse.ArgumentParser(description="Clustered pages in vLLM beside its own, on this CPU.")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--rounds", type=int, default=15, help="of attention")
    parser.add_argument("--case", type=json.loads, action="append", help="[blocks, requests, tokens, rounds], of pools")
    parser.add_argument(
        "--processor-time", action="store_true", help="one thread and its processor time: where others use the machine"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER")
    parser.add_argument("--figure", type=Path, default=ROOT / "docs" / "figures" / "serving-pools.png", metavar="FILE")
    parser.add_argument("--draw", action="store_true", help="measure nothing; draw what the results hold")
    arguments = parser.parse_args()
    if not arguments.draw:
        measure(arguments)
    if importlib.util.find_spec("matplotlib") is None:
        print("Nothing is drawn: matplotlib is not installed here")
        return
    from benchmarks.vllm.figure import draw_pools

    draw_pools(arguments.figure, json.loads((arguments.results / "pools.json").read_text())["found"])


def measure(arguments: argparse.Namespace) -> None:
    if "attention" in arguments.parts:
        from benchmarks.vllm.attention import measure_attention, show_attention

        results = measure_attention(arguments.rounds, arguments.processor_time)
        (arguments.results / "attention.json").write_text(json.dumps(results) + "\n")
        show_attention(results["found"])
    if "pools" in arguments.parts:
        results = measure_pools([tuple(case) for case in arguments.case or CASES], arguments.processor_time)
        (arguments.results / "pools.json").write_text(json.dumps(results, indent=1) + "\n")
        show_pools(results["found"])


if __name__ == "__main__":
    main()
