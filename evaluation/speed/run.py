"""The course of the benchmark."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from ..machine import describe, keep_freed_memory
from ..models import load_llama, smollm2_folder
from ..places import writing
from ..report import Section, print_sections
from ..texts import load_tokens
from .attention import attention_alone
from .contenders import CONTENDERS
from .decoding import decoding, end_to_end
from .figures import draw_decoding, draw_serving
from .linear import hasten_linear_layers
from .memory import peak_memory
from .serving import SERVED, serving

__all__ = ["run_bench"]


@dataclass(frozen=True)
class Sizes:
    """How large each section's problem is."""

    rounds: int
    seen: int
    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    decode_batches: tuple[int, ...]
    prompt: int
    n_new: int
    served: int
    budgets_mib: tuple[int, ...]
    memory_context: int


END_TO_END_ROUNDS = 1
FULL = Sizes(7, 32_768, (1, 8), (4_096, 8_192, 32_768), (1, 4), 8_192, 256, 4_096, (512, 1_024, 2_048), 32_768)
QUICK = Sizes(2, 2_048, (1,), (512, 1_024), (1,), 256, 8, 512, (64, 128), 1_024)


def run_bench(*, quick: bool, json_path: Path | None, figures: Path | None, sections: set[str]) -> bool:
    """Measure, print, write; whether every target was met."""
    keep_freed_memory()
    sizes = QUICK if quick else FULL
    console = Console(width=None if sys.stdout.isatty() else 132)
    machine = describe()
    console.print(", ".join(f"{name} {value}" for name, value in machine.items()))
    folder = smollm2_folder()
    model, tokenizer = load_llama(folder)
    hasten_linear_layers(model)
    turns = sizes.rounds + 1
    measured: list[Section] = []
    with Progress(console=console, transient=True) as progress:

        def bar(name: str, steps: int) -> Callable[[], object]:
            task = progress.add_task(name, total=steps)
            return lambda: progress.advance(task)

        if "1" in sections:
            steps = 2 * len(sizes.batches) * 7 * turns
            measured.append(attention_alone(sizes.seen, sizes.batches, sizes.rounds, bar("attention", steps)))
        if "2" in sections:
            steps = len(sizes.contexts) * len(sizes.decode_batches) * (len(CONTENDERS) + 1) * turns
            measured.append(decoding(model, sizes.contexts, sizes.decode_batches, sizes.rounds, bar("decode", steps)))
            if figures is not None:
                draw_decoding(figures / "decoding.png", measured[-1].numbers["runs"])
        if "3" in sections:
            prompt = load_tokens(None, tokenizer, sizes.prompt)
            advance = bar("end to end", END_TO_END_ROUNDS * len(CONTENDERS))
            measured.append(end_to_end(model, prompt, sizes.n_new, END_TO_END_ROUNDS, advance))
        if "4" in sections:
            budgets = tuple(mib * 2**20 for mib in sizes.budgets_mib)
            steps = len(budgets) * len(SERVED) * turns
            measured.append(serving(model, sizes.served, budgets, sizes.rounds, bar("serve", steps)))
            if figures is not None:
                draw_serving(figures / "serving.png", measured[-1].numbers["runs"], sizes.served)
        if "5" in sections:
            measured.append(peak_memory(folder, sizes.memory_context, 1))
    if quick:
        measured = [without_targets(section) for section in measured]
    print_sections(console, measured)
    if json_path is not None:
        content = {"machine": machine, "quick": quick, "sections": [section.as_json() for section in measured]}
        with writing(json_path):
            json_path.write_text(json.dumps(content, indent=1) + "\n")
    return all(claim.is_met for section in measured for claim in section.claims)


def without_targets(section: Section) -> Section:
    """The same measurements, too small to decide anything."""
    return replace(section, lines=[replace(line, claim=None) for line in section.lines])
