"""The profiles that ship with the package: `python benchmarks/tuning/run.py`.

Each model of `MODELS` is tuned by `kvcluster tune`'s own code; of each result the shares, the order of the heads, the
bits and what they depend on go into `fast/huggingface/profiles.json`, which `known_profile` reads, and what was lost in
each number of bits into docs/tuning.md.
"""

import argparse
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # of a script only its own folder is on the path

from benchmarks.published.tables import TITLES
from kvcluster.evaluation.pages import fill, table
from kvcluster.evaluation.tuning.run import Settings, run_tune
from kvcluster.fast.huggingface.bytes_ratio import BITS

__all__ = ["PAGE", "bits_tables", "main", "shipped"]

MODELS = ("smollm2", "gemma3-270m")
RESULTS = Path(__file__).resolve().parent / "results"
PAGE = ROOT / "docs" / "tuning.md"
SHIPPED = ROOT / "fast" / "huggingface" / "profiles.json"
FIELDS = ("name", "weights", "layers", "keeps", "shares", "heads", "bits", "rule", "settings", "command", "kvcluster")
# Layers with attended matching by default: those where the text gains and no needle is lost (benchmarks/attended).
ATTENDED = {"gemma3-270m": [17], "smollm2": list(range(30))}


def main() -> None:
    """Measure, draw, ship."""
    parser = argparse.ArgumentParser(description="The profiles that ship with the package.")
    parser.add_argument("--model", choices=MODELS, help="all of them without it")
    parser.add_argument("--ship-only", action="store_true", help="measure nothing: write what ships, from the results")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    arguments = parser.parse_args()
    chosen = MODELS if arguments.model is None else (arguments.model,)
    for name in () if arguments.ship_only else chosen:
        measured = ROOT / ".cache" / "tuning" / f"{name}.json"
        measured.parent.mkdir(parents=True, exist_ok=True)
        settings = Settings(name, None, n_contexts=3, n_tokens=4096)
        figure = ROOT / "docs" / "figures" / f"profile-{name}.png"
        run_tune(settings, json_path=measured, figure=figure, threads=arguments.threads)
        shutil.copy(measured, RESULTS)
    results = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    SHIPPED.write_text(shipped(results))
    PAGE.write_text(fill(PAGE.read_text(), bits_tables(results)))


def shipped(results: list[dict[str, Any]]) -> str:
    """The text of the file that ships: JSON, a result of `kvcluster tune` a line, with those fields that matter."""
    lines = []
    for result in results:
        line = {name: result[name] for name in FIELDS} | {"attended": ATTENDED[result["settings"]["model"]]}
        lines.append(json.dumps(line))
    return "[\n" + ",\n".join(lines) + "\n]\n"


def bits_tables(results: list[dict[str, Any]]) -> dict[str, str]:
    """Each as Markdown: what is lost in each number of bits at equal bytes, the least of each row in bold."""
    tables = {}
    for result in results:
        rows = []
        for at in result["bits"]:
            losses = [at["losses"].get(str(bits)) for bits in BITS]
            cells = ["" if loss is None else f"{loss:.3f}" for loss in losses]
            cells[BITS.index(at["bits"])] = f"**{cells[BITS.index(at['bits'])]}**"
            rows.append([f"{at['bytes_ratio']:g}", *cells])
        name = result["settings"]["model"]
        head = ["bytes", *(f"{bits} bits" for bits in BITS)]
        tables[name] = f"{TITLES[name]}:\n\n" + table(head, rows)
    return tables


if __name__ == "__main__":
    main()
