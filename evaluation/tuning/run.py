"""The course of `kvcluster tune`: read contexts twice, share out what is kept, order the heads, say so."""

import hashlib
import json
import shlex
import sys
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

from kvcluster.fast.huggingface.hooks import MODEL_TYPES
from kvcluster.fast.huggingface.saving import fingerprint, weights_digest
from kvcluster.fast.huggingface.profiles import n_whole_by_default

from ..machine import describe
from ..models import load_model
from ..runs import Runs
from ..texts import built_in_text, encode, opening, read_text, span
from .figure import draw_shares
from .second_reading import N_PIECE, pieces_to_repeat, second_reading
from .shares import KEEP, KEEPS, N_RECENT, N_SINK, check_body, head_shares, order_heads

__all__ = ["Settings", "run_tune", "tune"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WHOLE, HARDLY = 0.9, 0.05  # shares that the table counts
BARS = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())


@dataclass(frozen=True)
class Settings:
    """What the user asked for; see the options of the command. `text` is a name, None for the built-in text."""

    model: str
    text: str | None
    n_contexts: int
    n_tokens: int


def run_tune(settings: Settings, *, json_path: Path | None, figure: Path | None, threads: int | None) -> None:
    """Measure what is missing, print, write, draw."""
    if threads is not None:
        torch.set_num_threads(threads)
    console = Console(width=None if sys.stdout.isatty() else 100)
    text = built_in_text() if settings.text is None else read_text(Path(settings.text))
    model, tokenizer = load_model(settings.model, MODEL_TYPES)
    runs = Runs(None if json_path is None else json_path.with_suffix(".runs.jsonl"))
    with Progress(*BARS, console=console, transient=True) as progress:
        result = tune(model, tokenizer, text, settings, runs, progress)
    print_heads(console, result)
    if json_path is not None:
        lines = [f" {json.dumps(name)}: {json.dumps(value, allow_nan=False)}" for name, value in result.items()]
        json_path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
        console.print(f"Written: {json_path}", highlight=False, soft_wrap=True)
    if figure is not None:
        heads = [(layer, head) for layer, head in result["heads"]]
        shares = torch.tensor(result["shares"][KEEPS.index(KEEP)]).numpy()
        draw_shares(figure, shares, result["layers"], heads, result["name"])
        console.print(f"Figure: {figure}", highlight=False, soft_wrap=True)


def tune(model: Any, tokenizer: Any, text: str, settings: Settings, runs: Runs, progress: Progress) -> dict[str, Any]:
    """Shares of all heads and their order, as JSON: fields in the order of importance to a reader.

    Contexts are of the tuning half of `text`; those that `runs` has are not read again.

    Raises
    ------
    ValueError : a text that is too short, a context that is too short or beyond the model's positions; see
        `second_reading`.
    """
    check_body(settings.n_tokens)
    tokens, start = encode(tokenizer, text), opening(tokenizer)
    length = settings.n_tokens - len(start)
    contexts = [start + span(tokens, "tuning", number, length) for number in range(settings.n_contexts)]
    weights = {str(dtype).removeprefix("torch."): weights_digest(model, dtype) for dtype in DTYPES}
    model_fields = fingerprint(model)
    rule = {"keeps": list(KEEPS), "n_sink": N_SINK, "n_recent": N_RECENT, "n_piece": N_PIECE}
    found = []
    for number, context in enumerate(contexts):
        key = rule | {"tokens": digest(context), "model": model_fields["weights"]}
        run = runs.found(key)
        if run is None:
            run = runs.add({"key": key} | measure(model, tokenizer, context, progress, f"Context {number + 1}"))
        found.append(run)
    layers = found[0]["layers"]
    shares = torch.tensor([run["shares"] for run in found], dtype=torch.float64).mean(dim=0)
    return {
        "name": Path(str(model.config.name_or_path)).name,
        "heads": order_heads(shares[KEEPS.index(KEEP)], layers),
        "layers": layers,
        "keeps": list(KEEPS),
        "shares": rounded(shares),
        "weights": weights,
        "model": model_fields,
        "settings": asdict(settings)
        | {"n_sink": N_SINK, "n_recent": N_RECENT, "n_piece": N_PIECE, "part": "tuning"}
        | { "text_sha256": hashlib.sha256(text.encode()).hexdigest()},
        "contexts": [{"tokens": run["key"]["tokens"], "shares": run["shares"]} for run in found],
        "command": command(settings),
        "kvcluster": version("kvcluster"),
        "machine": describe(),
        "seconds": round(sum(run["seconds"] for run in found), 1),
    }


def measure(model: Any, tokenizer: Any, context: list[int], progress: Progress, name: str) -> dict[str, Any]:
    """The shares of one context, and the layers that they are of."""
    begun = time.perf_counter()
    pieces = pieces_to_repeat(tokenizer, context)
    task = progress.add_task(f"{name}, read twice", total=1 + len(pieces))
    scores = second_reading(model, context, pieces, on_piece=lambda: progress.advance(task))
    stacked = torch.stack(list(scores.values()))
    shares = torch.stack([head_shares(stacked, keep=keep) for keep in KEEPS])
    return {"layers": list(scores), "shares": rounded(shares), "seconds": round(time.perf_counter() - begun, 1)}


def digest(tokens: list[int]) -> str:
    return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()


def rounded(shares: Tensor) -> list[list[list[float]]]:
    return [[[round(share, 6) for share in layer] for layer in at_keep] for at_keep in shares.tolist()]


def command(settings: Settings) -> str:
    """What measures the same again."""
    text = [] if settings.text is None else ["--text", settings.text]
    sizes = ["--contexts", str(settings.n_contexts), "--tokens", str(settings.n_tokens)]
    return shlex.join(["kvcluster", "tune", settings.model, *text, *sizes])


def print_heads(console: Console, result: dict[str, Any]) -> None:
    """The heads of the largest shares, a rule below the first 4 %, and how the others fare."""
    heads, layers, place = result["heads"], result["layers"], result["keeps"].index(KEEP)
    shares = [result["shares"][place][layers.index(layer)][head] for layer, head in heads]
    n_shown, n_whole = max(10, len(heads) // 5), n_whole_by_default(len(heads))
    table = Table(title="The heads that look back most", caption_justify="left")
    for column in ("layer", "KV head", "share", "% of heads"):
        table.add_column(column, justify="right")
    for number, ((layer, head), share) in enumerate(zip(heads[:n_shown], shares, strict=False), 1):
        cells = (str(layer), str(head), f"{share:.3f}", f"{100 * number / len(heads):.1f}")
        table.add_row(*cells, end_section=number == n_whole)
    console.print(table)
    alone = [order_heads(torch.tensor(each["shares"][place]), layers)[:n_whole] for each in result["contexts"]]
    n_always = len(set.intersection(*map(set, alone)))
    console.print(
        f"Share: part of a head's tokens among the {100 * KEEP:.0f} % of all heads' most attended to while the text is "
        f"read again. {sum(share > WHOLE for share in shares)} of the {len(heads)} heads have more than {WHOLE:g}, "
        f"{sum(share < HARDLY for share in shares)} less than {HARDLY:g}. "
        f"Above the line: the first 4 %, at least one: {n_whole}. By each context alone: the same {n_always}.",
        highlight=False,
    )
