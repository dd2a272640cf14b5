"""The demo itself: the same conversations with two servers, one after the other, watched by their own metrics."""

import asyncio
import contextlib
import statistics
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..models import smollm2_folder
from ..texts import built_in_text, encode
from .server import NAME, Server

__all__ = ["Run", "converse", "run_demo"]

CHUNK_SIZE, N_RECENT = 128, 32
QUESTION = "\n\nIn one sentence: what does the text above explain?"
BARS = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
WATCHED_EVERY = 0.1  # seconds
END = "<|im_end|>"  # ends an answer; generation goes on to one length for all, so that both servers do the same work


@dataclass
class Run:
    """What was observed of one server.

    Attributes
    ----------
    most_at_once, most_held : requests that ran together and blocks that they held, at most.
    seconds : from the first question to the last token.
    waits : seconds until the first token, of each conversation.
    """

    n_new: int
    most_at_once: int = 0
    most_held: int = 0
    preemptions: int = 0
    seconds: float = 0.0
    waits: list[float] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Generated tokens per second, reading the texts included."""
        return len(self.answers) * self.n_new / self.seconds


def run_demo(*, keep_ratio: float, n_conversations: int, n_text: int, n_new: int, n_blocks: int) -> None:
    """Serve, print, compare.

    Raises
    ------
    ServerFailedError : a server did not come up.
    ValueError : the built-in text is too short for so many conversations.
    """
    console, folder = Console(width=None if sys.stdout.isatty() else 100), smollm2_folder()
    texts = texts_of(folder, n_conversations, n_text)
    asked = {"keep_ratio": keep_ratio, "chunk_size": CHUNK_SIZE, "n_recent": N_RECENT}
    options = {"dtype": "bfloat16", "max-model-len": n_text + n_new + 128, "max-num-batched-tokens": 4096}
    runs = {}
    for name, kvcluster in (("stock", None), ("clustered", asked)):
        with contextlib.ExitStack() as stack:
            with console.status(f"Starting vLLM, {name} (half a minute)"):
                server = stack.enter_context(Server(folder, kvcluster, n_blocks=n_blocks, options=options))
            runs[name] = asyncio.run(watched(server, texts, n_new, name, console))
    console.print(table(runs, n_conversations, n_text, n_blocks, keep_ratio))


def texts_of(folder: Path, number: int, length: int) -> list[str]:
    """Parts of the built-in text, one after the other."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    tokens = encode(tokenizer, built_in_text())
    if len(tokens) < number * length:
        raise ValueError(f"tokens * conversations must be at most {len(tokens):,}, got {number * length:,}")
    return [tokenizer.decode(tokens[at * length : (at + 1) * length]) for at in range(number)]


async def watched(server: Server, texts: list[str], n_new: int, name: str, console: Console) -> Run:
    """All conversations at once, with a bar for their tokens and the first answer as it comes."""
    run = Run(n_new, answers=[""] * len(texts))
    progress = Progress(*BARS)
    task = progress.add_task(f"Tokens, {name}", total=len(texts) * n_new)
    start = time.perf_counter()
    with Live(console=console, refresh_per_second=8) as live:

        def show(metrics: Mapping[str, float]) -> None:
            run.most_at_once = max(run.most_at_once, int(metrics["running"]))
            run.most_held = max(run.most_held, server.n_held(metrics))
            run.preemptions = int(metrics["preemptions"])
            progress.update(task, completed=metrics["generated"])
            title = f"The first of {len(texts)} answers; {metrics['running']:.0f} run, {metrics['waiting']:.0f} wait"
            live.update(Group(progress, Panel(run.answers[0].split(END)[0], title=title, title_align="left")))

        asking = asyncio.gather(*(converse(server, text, run, at, start) for at, text in enumerate(texts)))
        try:
            while not asking.done():
                show(await asyncio.to_thread(server.metrics))
                await asyncio.sleep(WATCHED_EVERY)
        finally:  # at Ctrl-C, or where the server fails, conversations end too
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
        await asking
        run.seconds = time.perf_counter() - start
        show(await asyncio.to_thread(server.metrics))
    if not console.is_terminal:
        console.print()  # there the last live line has no line break
    return run


async def converse(server: Server, text: str, run: Run, at: int, start: float) -> None:
    """One conversation: a text, a question, and the answer as it is streamed."""
    messages: Any = [{"role": "user", "content": text + QUESTION}]
    async with server.client() as client:
        stream = await client.chat.completions.create(
            model=NAME,
            messages=messages,
            max_tokens=run.n_new,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True, "skip_special_tokens": False},
        )
        async for part in stream:
            words = part.choices[0].delta.content if part.choices else None
            if words:
                if not run.answers[at]:
                    run.waits.append(time.perf_counter() - start)
                run.answers[at] += words


def table(runs: Mapping[str, Run], n_conversations: int, n_text: int, n_blocks: int, keep_ratio: float) -> Table:
    """Both servers side by side."""
    comparison = Table(title=f"{n_conversations} conversations of about {n_text:,} tokens, a pool of {n_blocks} blocks")
    comparison.add_column("")
    for name in ("stock", f"clustered, keep {keep_ratio:g}", "clustered / stock"):
        comparison.add_column(name, justify="right")
    stock, ours = runs["stock"], runs["clustered"]
    comparison.add_row(
        "requests at once, at most",
        *(str(run.most_at_once) for run in (stock, ours)),
        f"{ours.most_at_once / stock.most_at_once:.2f}",
    )
    comparison.add_row("blocks held, at most", *(f"{run.most_held} of {n_blocks - 1}" for run in (stock, ours)), "")
    comparison.add_row("preemptions", *(str(run.preemptions) for run in (stock, ours)), "")
    comparison.add_row(
        "seconds for all", *(f"{run.seconds:.1f}" for run in (stock, ours)), ratio(stock, ours, "seconds")
    )
    comparison.add_row(
        "generated tokens per second, reading included",
        *(f"{run.rate:.1f}" for run in (stock, ours)),
        ratio(stock, ours, "rate"),
    )
    comparison.add_row(
        "seconds to the first token, median", *(f"{statistics.median(run.waits):.1f}" for run in (stock, ours)), ""
    )
    return comparison


def ratio(stock: Run, ours: Run, name: str) -> str:
    return f"{getattr(ours, name) / getattr(stock, name):.2f}"
