"""`kvcluster eval`: what a model still knows of a context when its cache was compressed, before a question or after."""

from pathlib import Path
from typing import Annotated

import typer

from .lists import items, number
from .refusing import check_places, fail

__all__ = ["evaluate"]

DEFAULT_TASKS = {False: "needles,perplexity", True: "needles"}  # by whether questions come first


def evaluate(
    model: Annotated[str, typer.Option(help="smollm2, gemma3-270m, or the folder of a local model.")] = "smollm2",
    text: Annotated[
        Path | None, typer.Option(help="Text file, UTF-8. [default: the Python language reference, from pydoc]")
    ] = None,
    method: Annotated[str, typer.Option(help="Methods, such as full,chunked,recall.")] = "full,chunked",
    keep: Annotated[
        str, typer.Option(help="Stored entries / tokens of context, sinks and recent tokens included.")
    ] = "0.5,0.25,0.2",
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Of needles, perplexity, attention, ruler. [default: needles, and perplexity unless --question-first]"
        ),
    ] = None,
    tokens: Annotated[str, typer.Option(help="Lengths of context.")] = "4096",
    contexts: Annotated[int, typer.Option(min=1, help="Contexts of each length, and of each task of ruler.")] = 4,
    needles: Annotated[int, typer.Option(min=1, help="Needles in each context.")] = 12,
    kinds: Annotated[str, typer.Option(help="What needles end in.")] = "digits,words",
    following: Annotated[int, typer.Option(min=1, help="Tokens after the context, for perplexity.")] = 512,
    part: Annotated[str, typer.Option(help="Half of the text, and its needles: tuning or reporting.")] = "reporting",
    question_first: Annotated[
        bool,
        typer.Option("--question-first", help="Compress after each question, as published, not before any is asked."),
    ] = False,
    stepwise: Annotated[bool, typer.Option("--stepwise", help="Read everything asked token by token.")] = False,
    longbench: Annotated[
        Path | None, typer.Option(help="Folder with LongBench's JSON lines; the first --contexts of each.")
    ] = None,
    ruler_files: Annotated[Path | None, typer.Option(help="Folder with RULER's JSON lines, the same.")] = None,
    profile: Annotated[
        Path | None,
        typer.Option(help="What `kvcluster tune MODEL --json FILE` wrote. [default: what ships for the model]"),
    ] = None,
    json: Annotated[
        Path | None,
        typer.Option(help="Write results here, and each run beside it as it ends; what is there is not run again."),
    ] = None,
    figures: Annotated[Path | None, typer.Option(help="Folder to save the figures in.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Of torch.")] = None,
) -> None:
    """Measure quality at equal stored entries: needles, perplexity, tasks like RULER's, LongBench's own files.

    A context is read and compressed once for each method; questions come later and are answered from copies of the
    cache. With --question-first the prompt is context and question, and compressed as a whole for each question: the
    first token of an answer comes from the exact prefill then, all others from the compressed cache.
    """
    try:
        from kvcluster.evaluation.quality.evaluate import Settings, run_eval
    except ModuleNotFoundError as error:
        fail("eval", f"{error.name} is not installed: pip install 'kvcluster[hf]'")

    check_places(json, figures)
    for path in (longbench, ruler_files):
        if path is not None and not path.is_dir():
            fail("eval", f"{path} must be a folder that exists")
    settings = Settings(
        model=model,
        text=text,
        methods=items(method),
        keeps=[number("eval", "keep", ratio, float) for ratio in items(keep)],
        tasks=items(DEFAULT_TASKS[question_first] if tasks is None else tasks),
        lengths=[number("eval", "tokens", length, int) for length in items(tokens)],
        n_contexts=contexts,
        n_needles=needles,
        kinds=items(kinds),
        n_following=following,
        which=part,
        is_stepwise=stepwise,
        is_question_first=question_first,
        longbench=longbench,
        ruler_files=ruler_files,
        profile=profile,
    )
    try:
        run_eval(settings, json_path=json, figures=figures, threads=threads)
    except (ValueError, ModuleNotFoundError) as error:
        fail("eval", str(error))
