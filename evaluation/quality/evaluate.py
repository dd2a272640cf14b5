"""The course of the evaluation."""

import hashlib
import json
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from kvcluster.fast.huggingface import Profile
from kvcluster.fast.huggingface.hooks import MODEL_TYPES

from ..errors import UnusableInputError
from ..machine import describe
from ..models import load_model
from ..places import writing
from ..runs import Runs
from ..texts import built_in_text, encode, read_text
from . import METHODS, TASKS, Case, Options, needle_cases, run_all, summarize, task_case, with_profile
from .figures import draw_attention_errors, draw_frontier, draw_heat_map, has_both
from .folders import longbench_cases, ruler_cases
from .run import check_methods
from .tables import print_summaries

__all__ = ["PARTS", "Settings", "run_eval"]

PARTS = ("needles", "perplexity", "attention", "ruler")
WITHOUT_QUESTION = ("perplexity", "attention")


@dataclass(frozen=True)
class Settings:
    """What the user asked for; see the options of the command."""

    model: str
    text: Path | None
    methods: list[str]
    keeps: list[float]
    tasks: list[str]
    lengths: list[int]
    n_contexts: int
    n_needles: int
    kinds: list[str]
    n_following: int
    which: str
    is_stepwise: bool
    is_question_first: bool
    longbench: Path | None
    ruler_files: Path | None
    profile: Path | None = None


def run_eval(settings: Settings, *, json_path: Path | None, figures: Path | None, threads: int | None) -> None:
    """Measure what is missing, print, write, draw."""
    unknown = sorted(set(settings.tasks) - set(PARTS))
    if unknown:
        raise ValueError(f"tasks must be of {', '.join(PARTS)}, got {', '.join(unknown)}")
    without = [task for task in settings.tasks if task in WITHOUT_QUESTION]
    if settings.is_question_first and without:
        raise ValueError(f"tasks must have a question where it comes first, got {', '.join(without)}")
    if min(settings.lengths, default=0) < 1:
        raise ValueError(f"tokens must be whole numbers of at least 1, got {settings.lengths}")
    methods = METHODS if settings.profile is None else with_profile(read_profile(settings.profile))
    pairs = check_methods((name, keep) for name in settings.methods for keep in settings.keeps)
    if threads is not None:
        torch.set_num_threads(threads)
    console = Console(width=None if sys.stdout.isatty() else 160)
    text = built_in_text() if settings.text is None else read_text(settings.text)
    model, tokenizer = load_model(settings.model, MODEL_TYPES)
    cases = make_cases(settings, tokenizer, text, model.config.max_position_embeddings)
    if not cases:
        raise ValueError("there must be something to do, got no tasks and no files")
    runs = Runs(None if json_path is None else json_path.with_suffix(".runs.jsonl"))
    options = Options(
        is_stepwise=settings.is_stepwise,
        has_attention_error="attention" in settings.tasks,
        is_question_first=settings.is_question_first,
    )
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("Evaluate", total=len(cases) * len(pairs))
        how: dict[str, Any] = {"options": options, "methods": methods}
        results = run_all(model, tokenizer, cases, pairs, runs, **how, on_run=lambda: progress.advance(task))
    summaries = summarize(results)
    print_summaries(console, summaries)
    if json_path is not None:
        written = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(settings).items()}
        content = {
            "machine": describe(),
            "settings": written | {"text_sha256": hashlib.sha256(text.encode()).hexdigest()},
            "summaries": summaries,
        }
        with writing(json_path):
            json_path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    if figures is not None:
        draw(figures, results, summaries, is_question_first=settings.is_question_first)


def read_profile(path: Path) -> Profile:
    """The profile in a file.

    Raises
    ------
    UnusableInputError : no such file. ValueError : another kind of file.
    """
    try:
        return Profile.read(path)
    except OSError as error:
        raise UnusableInputError(f"profile must be a readable file, got {path}: {error}") from error


def make_cases(settings: Settings, tokenizer: Any, text: str, n_positions: int) -> list[Case]:
    """All contexts with all that is asked."""
    wanted, tokens = set(settings.tasks), encode(tokenizer, text)
    cases: list[Case] = []
    if wanted & {"needles", "perplexity", "attention"}:
        planted = needle_cases(
            tokenizer,
            tokens,
            settings.which,
            lengths=settings.lengths,
            n_contexts=settings.n_contexts,
            n_needles=settings.n_needles,
            n_following=settings.n_following,
            kinds=settings.kinds,
        )
        cases += [only(case, wanted) for case in planted]
    if "ruler" in wanted:
        for length in settings.lengths:
            for name in TASKS:
                for number in range(settings.n_contexts):
                    cases.append(task_case(name, tokenizer, text, tokens, settings.which, number, length))
    longest = max(settings.lengths)
    for folder, read in ((settings.longbench, longbench_cases), (settings.ruler_files, ruler_cases)):
        if folder is not None:
            cases += read(tokenizer, folder, n_tokens=longest, n_cases=settings.n_contexts)
    for case in cases:
        n_after = [len(case.following), *(len(needle.question) + len(needle.answer) for needle in case.needles)]
        n_after += [len(prompt.question) + prompt.n_new for prompt in case.prompts]
        if len(case.tokens) + max(n_after) > n_positions:
            raise ValueError(
                f"tokens must leave room for {max(n_after)} more within the model's {n_positions:,} positions, got "
                f"{len(case.tokens):,}"
            )
    return cases


def only(case: Case, wanted: set[str]) -> Case:
    """The same context, with only what is measured."""
    needles = case.needles if "needles" in wanted else []
    return replace(case, needles=needles, following=case.following if wanted & {"perplexity", "attention"} else [])


def draw(
    folder: Path, results: list[dict[str, Any]], summaries: list[dict[str, Any]], *, is_question_first: bool
) -> None:
    """The figures of all results there are, which are of one setting; of question first the files say so."""
    for summary in summaries:
        if "needles" in summary:
            name, keep = summary["method"], summary["keep"]
            chosen = [x for x in results if (x["key"]["method"], x["key"]["keep"]) == (name, keep)]
            title = f"{name}, {keep:g} kept" if METHODS[name].has_keep else name
            file = f"needles-{name}-{keep:g}" if METHODS[name].has_keep else f"needles-{name}"
            if is_question_first:
                title, file = f"{title}, question first", f"{file}-question-first"
            draw_heat_map(folder / f"{file}.png", chosen, title)
    if any(map(has_both, summaries)):
        draw_frontier(folder / "frontier.png", summaries, "What is kept of a context, at equal stored entries")
    if any("attention_errors" in summary for summary in summaries):
        draw_attention_errors(folder / "attention-error.png", summaries, "Error of the attention output, by layer")
