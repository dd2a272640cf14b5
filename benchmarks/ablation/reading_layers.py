"""Which layers of a Llama answers read from, and in which order of importance.

Run `python benchmarks/ablation/reading_layers.py`.

`layer_ratios` asks for them. Only needles of the tuning set, none of those that results are reported on. Two measures:

(a) mass: how much attention the queries that predict an answer give to its own needle, in the full cache, summed over
    the heads of a layer, the mean over all answers' tokens.
(b) loss: the candidates, the twelve layers of the largest mass, keep all tokens, all other layers shrink to sinks and
    recent tokens; what the answers lose when one candidate shrinks as well, in nats per token.

The rule: reading layers are the nine candidates of the largest loss. The two of the largest loss come first, then the
other seven in the order of mass. Four minutes for SmolLM2-135M, whose prefilled contexts are kept in `.cache`.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # of a script only its own folder is on the path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers.utils.logging import disable_progress_bar

from benchmarks.ablation.layer_ratios import READING_LAYERS
from benchmarks.ablation.packed_scoring import Context, Held, answer_spans, exact, needle_spans, read_contexts, score
from kvcluster.evaluation.colours import BLACK, BLUE, GREY
from kvcluster.evaluation.models import load_llama, smollm2_folder

__all__ = ["choose_reading_layers", "main"]

HERE = Path(__file__).resolve().parent
N_SINK, N_RECENT = 4, 256
N_CANDIDATES, N_READING, N_FIRST = 12, 9, 2


def choose_reading_layers(mass: list[float], without: dict[int, float], *, n_reading: int = N_READING) -> list[int]:
    """The reading layers by the rule above, the most important first.

    Parameters
    ----------
    mass : of each layer.
    without : nats of answers when that candidate shrinks as well.

    Examples
    --------
    Layers 2 and 1 are missed most, then layer 0 has more mass than layer 3, and layer 4 is missed least:

    >>> choose_reading_layers([0.9, 0.2, 0.5, 0.4, 0.8], {0: 0.4, 1: 1.5, 2: 1.9, 3: 0.5, 4: 0.3}, n_reading=4)
    [2, 1, 0, 3]
    """
    reading = sorted(without, key=lambda layer: without[layer], reverse=True)[:n_reading]
    return reading[:N_FIRST] + sorted(reading[N_FIRST:], key=lambda layer: mass[layer], reverse=True)


def main() -> None:
    """Measure, print, draw."""
    parser = argparse.ArgumentParser(description="The layers of a Llama that answers read from.")
    parser.add_argument("--model", type=Path, help="a folder in transformers' format; SmolLM2-135M without it")
    parser.add_argument("--contexts", type=int, default=4)
    parser.add_argument("--needles", type=int, default=12, help="in each context")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--kind", default="digits", help="of answers: digits or words")
    parser.add_argument("--candidates", type=int, default=N_CANDIDATES, help="of which each is left out in turn")
    parser.add_argument("--reading", type=int, default=N_READING, help="layers that are wanted")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--json", type=Path, default=HERE / "results" / "reading-layers.json", metavar="FILE")
    parser.add_argument("--figure", type=Path, default=ROOT / "docs" / "figures" / "reading-layers.png", metavar="FILE")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    disable_progress_bar()
    console = Console(width=None if sys.stdout.isatty() else 100)
    model, tokenizer = load_llama(arguments.model or smollm2_folder())
    sizes = {"lengths": [arguments.tokens], "n_contexts": arguments.contexts, "n_needles": arguments.needles}
    contexts = read_contexts(model, tokenizer, "tuning", arguments.kind, **sizes)
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("layers", total=len(contexts) * (arguments.candidates + 2))
        results = measure(model, contexts, arguments.candidates, lambda: progress.advance(task))
    results["reading_layers"] = choose_reading_layers(results["mass"], results["without"], n_reading=arguments.reading)
    results["configuration"] = sizes | {"kind": arguments.kind, "model": Path(model.config.name_or_path).name}
    arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    console.print(table_of(results))
    console.print(f"reading layers: {tuple(results['reading_layers'])}")
    if arguments.model is None and arguments.kind == "digits":
        is_shipped = tuple(results["reading_layers"]) == READING_LAYERS
        console.print(f"the shipped ones are {READING_LAYERS}: {'the same' if is_shipped else 'they DIFFER'}")
    draw(arguments.figure, results)


def measure(model: Any, contexts: list[Context], n_candidates: int, on_step: Callable[[], object]) -> dict[str, Any]:
    """`mass` of each layer, nats of answers in the full cache, with all candidates, without each."""
    mass, nll = torch.zeros(len(model.model.layers)), []
    for context in contexts:
        of_context, lost = needle_mass(model, context)
        mass += of_context / len(contexts)
        nll += lost
        on_step()
    candidates = mass.argsort(descending=True, stable=True)[:n_candidates].tolist()

    def answers(kept: set[int]) -> float:
        nats: list[float] = []
        for context in contexts:
            layers = [held if layer in kept else shrunk(held) for layer, held in enumerate(exact(context.read))]
            scores = score(model, context.case, layers)
            nats += [nat for needle in scores for nat in needle.nll]
            on_step()
        return sum(nats) / len(nats)

    with_all = answers(set(candidates))
    without = {layer: answers(set(candidates) - {layer}) for layer in candidates}
    return {"mass": mass.tolist(), "full": sum(nll) / len(nll), "with_all": with_all, "without": without}


def needle_mass(model: Any, context: Context) -> tuple[torch.Tensor, list[float]]:
    """Mass of each layer, and nats of all answers' tokens, in the full cache."""
    case, mass = context.case, torch.zeros(len(context.read))
    pairs = list(zip(answer_spans(case), needle_spans(case), strict=True))
    n_queries = sum(rows.stop - rows.start for rows, _ in pairs)

    def watch(layer: int, weights: torch.Tensor) -> None:
        mass[layer] += sum(weights[:, rows, needle].sum() for rows, needle in pairs) / n_queries

    scores = score(model, case, exact(context.read), watch=watch)
    return mass, [nat for needle in scores for nat in needle.nll]


def shrunk(held: Held) -> Held:
    """Sinks and recent tokens alone."""
    if held.counts.shape[1] <= N_SINK + N_RECENT:
        return held
    return Held(*(torch.cat([x[:, :N_SINK], x[:, -N_RECENT:]], dim=1) for x in (held.keys, held.values, held.counts)))


def table_of(results: dict[str, Any]) -> Table:
    table = Table(title=f"Nats of answers: full cache {results['full']:.3f}, all candidates {results['with_all']:.3f}")
    for name in ("layer", "mass on the needle", "nats without it", "place"):
        table.add_column(name, justify="right")
    for layer in sorted(range(len(results["mass"])), key=lambda layer: -results["mass"][layer]):
        lost = results["without"].get(layer)
        place = str(results["reading_layers"].index(layer) + 1) if layer in results["reading_layers"] else ""
        table.add_row(str(layer), f"{results['mass'][layer]:.4f}", "" if lost is None else f"{lost:.4f}", place)
    return table


def draw(path: Path, results: dict[str, Any]) -> None:
    """Both measures by layer, the reading layers in another colour, with their places."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from kvcluster.evaluation.quality.figures import save

    reading, mass, without = results["reading_layers"], results["mass"], results["without"]
    colour = [BLUE if layer in reading else GREY for layer in range(len(mass))]
    figure, (above, below) = plt.subplots(2, 1, figsize=(10, 6.5), sharex=True, layout="constrained")
    above.bar(range(len(mass)), mass, color=colour)
    above.set(
        ylabel="attention on the needle\n(sum over heads)",
        title="Where answers look: attention of the answer's queries on the sentence that they ask for",
    )
    candidates = sorted(without)
    below.bar(candidates, [without[layer] for layer in candidates], color=[colour[layer] for layer in candidates])
    below.axhline(results["with_all"], color=BLACK, linestyle="--", linewidth=1)
    below.text(
        0,
        1.03 * results["with_all"],
        f"all {len(without)} kept: {results['with_all']:.2f}\n(full cache: {results['full']:.2f})",
        fontsize=9,
        va="bottom",
    )
    below.margins(y=0.1)
    for layer in reading:
        place, height = reading.index(layer) + 1, without[layer]
        below.annotate(
            f"{place}", (layer, height), (0, 2), textcoords="offset points", ha="center", color=colour[layer]
        )
    below.set(
        xlabel="layer",
        ylabel="loss of the answers without it\n(nats a token)",
        title=f"What is missed: the {len(without)} layers that look most keep all tokens, but one",
    )
    below.set_xticks(range(0, len(mass), max(1, len(mass) // 30)))
    for axis in (above, below):
        axis.grid(axis="y", alpha=0.3)
        axis.set_axisbelow(True)
    figure.legend(
        handles=[plt.Rectangle((0, 0), 1, 1, color=c) for c in (BLUE, GREY)],
        labels=[f"the {len(reading)} reading layers; numbers: their order", "other layers"],
        loc="outside lower center",
        ncols=2,
        frameon=False,
    )
    save(figure, path)


if __name__ == "__main__":
    main()
