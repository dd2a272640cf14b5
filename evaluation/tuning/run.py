"""The course of `kvcluster tune`: read contexts twice, share out what is kept, order the heads, say so."""

import hashlib
import json
import shlex
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from kvcluster.fast.huggingface.bytes_ratio import BITS
from kvcluster.fast.huggingface.fingerprints import fingerprint, weights_digest
from kvcluster.fast.huggingface.hooks import MODEL_TYPES
from kvcluster.fast.huggingface.profiles import Profile, n_whole_by_default

from ..machine import describe
from ..models import load_model
from ..places import writing
from ..runs import Runs
from ..texts import built_in_text, read_text
from .bits import best_bits
from .direct import RATIO, check_parts
from .figure import draw_losses, draw_shares
from .rules import RULES, rule_for
from .shares import KEEP, KEEPS, N_RECENT, N_SINK, check_body, order_heads

__all__ = ["Settings", "run_tune", "tune"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WHOLE, HARDLY = 0.9, 0.05  # shares that the table counts
BARS = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())


@dataclass(frozen=True)
class Settings:
    """What the user asked for; see the options of the command. `text` is a name, None for the built-in text.

    `parts` are for the direct rule alone, None for its own; `with_bits` asks for the bits at each number of bytes too.
    """

    model: str
    text: str | None
    n_contexts: int
    n_tokens: int
    rule: str = "auto"
    parts: tuple[float, ...] | None = None
    with_bits: bool = True


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
    print_result(console, result)
    if json_path is not None:
        lines = [f" {json.dumps(name)}: {json.dumps(value, allow_nan=False)}" for name, value in result.items()]
        with writing(json_path):
            json_path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
        console.print(f"Written: {escape(str(json_path))}", highlight=False, soft_wrap=True)
    if figure is not None:
        draw(figure, result)
        console.print(f"Figure: {escape(str(figure))}", highlight=False, soft_wrap=True)


def draw(path: Path, result: dict[str, Any]) -> None:
    """The figure of the rule."""
    heads, shares = [(layer, head) for layer, head in result["heads"]], np.array(result["shares"])
    if result["rule"] == "reading":
        draw_shares(path, shares[KEEPS.index(KEEP)], result["layers"], heads, result["name"])
        return
    losses, in_order = np.array(result["losses"]), sorted(heads)
    of_heads = losses.reshape(len(heads), -1), result["parts"], shares.reshape(len(KEEPS), -1), result["keeps"]
    draw_losses(path, *of_heads, in_order, result["name"])


def tune(model: Any, tokenizer: Any, text: str, settings: Settings, runs: Runs, progress: Progress) -> dict[str, Any]:
    """The profile of a model, as JSON: fields in the order of importance to a reader.

    Contexts are of the tuning half of `text`; what `runs` has is not measured again.

    Raises
    ------
    ValueError : another rule; parts out of range, or for the rule that has none; a text that is too short, a context
        that is too short or beyond the model's positions; see `second_reading`.
    """
    check_body(settings.n_tokens)
    rule = rule_for(model, settings.rule)
    sizes: dict[str, Any] = {"n_contexts": settings.n_contexts, "n_tokens": settings.n_tokens}
    if settings.parts is not None:
        if rule != "direct":
            raise ValueError(f"parts must be left out with the rule {rule}, got {list(settings.parts)}")
        check_parts(settings.parts)
        sizes["parts"] = settings.parts
    weights = {str(dtype).removeprefix("torch."): weights_digest(model, dtype) for dtype in DTYPES}
    model_fields = fingerprint(model)
    measured = RULES[rule](model, tokenizer, text, runs, progress, **sizes)
    own_settings = {"n_sink": N_SINK, "n_recent": N_RECENT, "part": "tuning"}
    result = {"name": Path(str(model.config.name_or_path)).name, "rule": rule, **measured, "weights": weights}
    if settings.with_bits:
        sizes.pop("parts", None)
        profile = Profile.of(json.loads(json.dumps(result)))  # as it will be read
        result |= best_bits(model, tokenizer, text, profile, runs, progress, **sizes)
    return {
        **result,
        "model": model_fields,
        "settings": asdict(settings) | own_settings | {"text_sha256": hashlib.sha256(text.encode()).hexdigest()},
        "command": command(settings),
        "kvcluster": version("kvcluster"),
        "machine": describe(),
    }


def command(settings: Settings) -> str:
    """What measures the same again."""
    text = [] if settings.text is None else ["--text", settings.text]
    sizes = ["--contexts", str(settings.n_contexts), "--tokens", str(settings.n_tokens)]
    rule = [] if settings.rule == "auto" else ["--rule", settings.rule]
    parts = [] if settings.parts is None else ["--parts", ",".join(map(str, settings.parts))]
    bits = [] if settings.with_bits else ["--no-bits"]
    return shlex.join(["kvcluster", "tune", settings.model, *text, *sizes, *rule, *parts, *bits])


def print_result(console: Console, result: dict[str, Any]) -> None:
    """A table of heads, one of bits, and what they mean."""
    (print_shares if result["rule"] == "reading" else print_losses)(console, result)
    if "bits" in result:
        print_bits(console, result["bits"])


def print_bits(console: Console, found: list[dict[str, Any]]) -> None:
    """What is lost in each number of bits at equal bytes."""
    table = Table(title="What is lost at equal bytes (nats a token)")
    for column in ("bytes / 16 bits", *(f"{bits} bits" for bits in BITS), "least"):
        table.add_column(column, justify="right")
    for at in found:
        losses = [f"{at['losses'][str(bits)]:.3f}" if str(bits) in at["losses"] else "" for bits in BITS]
        table.add_row(f"{at['bytes_ratio']:g}", *losses, str(at["bits"]))
    console.print(table)
    console.print(
        "Bytes: of clustered entries over those of all their tokens in 16 bits; fewer bits buy more entries, shared "
        "out as above. Empty: all tokens fit in more bits.",
        highlight=False,
    )


def print_losses(console: Console, result: dict[str, Any]) -> None:
    """What each head loses, its shares, and what is lost with it alone whole."""
    title = "What is lost when one head alone keeps a part of its tokens (nats a token)"
    table = Table(title=title, padding=(0, 0, 0, 1))
    shares_at = ("at 0.1", "at 0.25", "at 0.5")
    for column in ("layer", "KV head", *(f"{part:g}" for part in result["parts"]), *shares_at, "whole"):
        table.add_column(column, justify="right")
    for layer, head in result["heads"][: n_shown(result)]:
        place = result["layers"].index(layer)
        losses = [f"{loss:.3f}" for loss in result["losses"][place][head]]
        shares = [f"{result['shares'][KEEPS.index(keep)][place][head]:.2f}" for keep in (0.1, 0.25, 0.5)]
        table.add_row(str(layer), str(head), *losses, *shares, f"{result['losses_whole'][place][head]:.3f}")
    console.print(table)
    console.print(
        "Loss: of what follows the text, plus of answers to questions about hidden sentences. At 0.1, 0.25 and 0.5: "
        "the shares of a mean of so much by which the losses add up to least. Whole: the loss when this head alone "
        f"keeps every token and all others {RATIO:g} of them, the published way; heads are in its order.",
        highlight=False,
    )


def n_shown(result: dict[str, Any]) -> int:
    """How many heads a table has: ten, or a fifth of them."""
    return max(10, len(result["heads"]) // 5)


def print_shares(console: Console, result: dict[str, Any]) -> None:
    """The heads of the largest shares, a rule below the first 4 %, and how the others fare."""
    heads, layers, place = result["heads"], result["layers"], result["keeps"].index(KEEP)
    shares = [result["shares"][place][layers.index(layer)][head] for layer, head in heads]
    n_whole = n_whole_by_default(len(heads))
    table = Table(title="The heads that look back most", caption_justify="left")
    for column in ("layer", "KV head", "share", "% of heads"):
        table.add_column(column, justify="right")
    for number, ((layer, head), share) in enumerate(zip(heads[: n_shown(result)], shares, strict=False), 1):
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
